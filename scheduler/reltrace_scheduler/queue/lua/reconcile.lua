-- Queues again what is leased to a worker that does not know of it: the message that told it was
-- lost with the connection.
--
-- KEYS: held:<worker> (read; jobs removed). Otherwise as release.lua without a delay.
--
-- ARGV: prefix, worker, then per lease that the worker knows: job id, attempt
--
-- Returns how many jobs were queued again.
local worker, known, count = ARGV[2], {}, 0

go_on_when_full()
for i = 3, #ARGV, 2 do
    known[ARGV[i]] = ARGV[i + 1]
end
for _, id in ipairs(redis.call("SMEMBERS", KEYS[1])) do
    local job = read_job(id)
    if not job or job.state ~= "LEASED" or job.worker ~= worker then
        redis.call("SREM", KEYS[1], id)
    elseif known[id] ~= job.attempt then
        release(job)
        count = count + 1
    end
end
flush(0)
return count
