-- Queues jobs again whose delay after a failed attempt is over.
--
-- Touches delayed (due jobs removed), job:<job> (queue, entry), and what enqueue() does. Publishes
-- wake:<model>.
--
-- ARGV: prefix, most jobs
--
-- Returns how many there were.
go_on_when_full()
local ids = redis.call("ZRANGEBYSCORE", key.delayed, "-inf", now(), "LIMIT", 0, ARGV[2])
for _, id in ipairs(ids) do
    local job = read_job(id)
    if job and job.state == "QUEUED" and not job.entry then
        requeue(job)
    end
end
call_many({"ZREM", key.delayed}, ids)
flush(0)
return #ids
