-- Queues again what a worker has leased and does not know of: the message that told it
-- was lost with the connection.
--
-- KEYS[1] held:<worker>                 set     read; jobs removed
-- also: as release.lua, whose plain case this is
--
-- ARGV: prefix, group, worker, then per lease that the worker knows: job id, attempt
--
-- Returns how many jobs were queued again.
local worker, known, count = ARGV[3], {}, 0

for i = 4, #ARGV, 2 do
    known[ARGV[i]] = ARGV[i + 1]
end
for _, id in ipairs(redis.call("SMEMBERS", KEYS[1])) do
    local job = read_job(id)
    if not job or job.state ~= "LEASED" or job.worker ~= worker then
        redis.call("SREM", KEYS[1], id)
    elseif known[id] ~= job.attempt then
        drop_lease(job)
        drop_chunks(job)
        requeue(job)
        count = count + 1
    end
end
settle(0)
return count
