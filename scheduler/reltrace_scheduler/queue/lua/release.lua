-- Takes leases back that a worker hands back: at once into their queue, or, after an
-- attempt that failed for a reason that may pass, after a while, and not for ever.
--
-- also: job:<job>                       hash    state QUEUED; failures + 1
--       queue:<class>:<tenant>:<model>  stream  old entry deleted, new one added
--       delayed                         zset    jobs whose attempt failed
--       held:<worker>                   set     the jobs removed
--       chunks:<job>:<attempt>          list    deleted: what was computed so far is void
--       draft:<job>                     stream  deleted
--       submission:<sub>, load, tenant:<tenant>  hash  bytes of those chunks taken off
-- publishes wake:<model>
--
-- ARGV: prefix, group, worker, delay after the first failure (ms; "": none has failed), most
--       failures, then per lease: job id, attempt
--
-- Returns {number taken back, {job id, attempt} of each job that failed too often, ...}:
--         the latter are still leased, and the caller ends them.
local worker, delay, most = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local reply = {0}

for i = 6, #ARGV, 2 do
    local job = read_job(ARGV[i])
    if job and job.state == "LEASED" and job.worker == worker and job.attempt == ARGV[i + 1] then
        local failures = delay and redis.call("HINCRBY", job.key, "failures", 1) or 0
        if failures > most then
            reply[#reply + 1] = {job.id, job.attempt}
        else
            drop_lease(job)
            drop_chunks(job)
            reply[1] = reply[1] + 1
            if delay then
                redis.call("HSET", job.key, "state", "QUEUED")
                redis.call("HDEL", job.key, "worker", "entry")
                redis.call("ZADD", prefix .. "delayed",
                    now() + delay * 2 ^ (failures - 1), job.id)
            else
                requeue(job)
            end
        end
    end
end
settle(0)
return reply
