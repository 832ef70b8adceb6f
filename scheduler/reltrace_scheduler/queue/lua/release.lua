-- Takes leases back that a worker releases: into their queue at once, or, after an attempt that
-- failed for a reason that may pass, after a delay that doubles, and a limited number of times.
--
-- Touches job:<job> (state QUEUED; failures + 1), queue:<...> (entry deleted, new one added),
-- delayed (jobs whose attempt failed), held:<worker> (jobs removed), chunks:<job>:<attempt> and
-- draft:<job> (deleted), submission:<sub>, load, tenant:<tenant> (their bytes taken off). Publishes
-- wake:<model>.
--
-- ARGV: prefix, worker, delay after the first failure (ms; "": none has failed), most failures,
--       then per lease: job id, attempt
--
-- Returns per lease: 1 taken back, 0 not the worker's, -1 failed too often: it is still leased, and
--         the caller ends the job.
local worker, delay, max_failures = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local outcome = {}

go_on_when_full()
for i = 5, #ARGV, 2 do
    local job = read_leased(ARGV[i], worker, ARGV[i + 1])
    local code = 0
    if job then
        local failures = delay and redis.call("HINCRBY", job.key, "failures", 1) or 0
        code = failures > max_failures and -1 or 1
        if code == 1 and delay then
            end_lease(job)
            discard_chunks(job)
            redis.call("HSET", job.key, "state", "QUEUED")
            redis.call("HDEL", job.key, "worker", "entry")
            redis.call("ZADD", key.delayed, now() + delay * 2 ^ (failures - 1), job.id)
        elseif code == 1 then
            release(job)
        end
    end
    outcome[#outcome + 1] = code
end
flush(0)
return outcome
