-- Queues jobs again whose wait after a failed attempt is over.
--
-- KEYS[1] delayed                         zset    due jobs removed
-- also: job:<job>                         hash    queue, entry
--       queue:<class>:<tenant>:<model>    stream  an entry per job; queues, turns:<...>
-- publishes wake:<model>
--
-- ARGV: prefix, group, most jobs
--
-- Returns how many there were.
local ids = redis.call("ZRANGEBYSCORE", KEYS[1], "-inf", now(), "LIMIT", 0, ARGV[3])
for _, id in ipairs(ids) do
    local job = read_job(id)
    if job and job.state == "QUEUED" and not job.entry then
        requeue(job)
    end
end
if #ids > 0 then
    call_many({"ZREM", KEYS[1]}, ids)
end
settle(0)
return #ids
