-- Ends jobs from outside: cancelled, past their time, or condemned. What they were
-- doing is void; their result is one chunk that says why.
--
-- also: job:<job>                       hash    state
--       queue:<class>:<tenant>:<model>  stream  the job's entry is acknowledged and deleted
--       delayed, deadlines              zset    the job removed
--       parked:<sub>                    list    the job removed
--       held:<worker>                   set     the job removed
--       chunks:<job>:<attempt>          list    deleted
--       draft:<job>                     stream  deleted
--       submission:<sub>, results:<sub>, expiring, load, tenant:<tenant>, ended
--                                       as in commit.lua
--       quarantined                     zset    a job that is quarantined
--       quarantined:<job>               hash    what it was
-- publishes done:<sub>, revoked:<worker>
--
-- ARGV: prefix, group, result ttl (ms), how many quarantined jobs are kept, for how long (ms), then
--       per job: job id, attempt ("": any), state, chunk
--
-- Returns per job the name of the queue that it was in, or "" where this did not end it: it had
-- ended, is unknown, or is at another attempt.
local ttl, max_quarantined, quarantine_ttl = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local outcome, revoked = {}, {}

local function quarantine(job, time)
    local row = redis.call("HMGET", job.key, "spec", "history")
    local key = prefix .. "quarantined:" .. job.id
    redis.call("HSET", key, "tenant", submission_of(job.id).tenant, "spec", row[1],
        "history", row[2] or "")
    redis.call("PEXPIRE", key, quarantine_ttl)
    redis.call("ZADD", prefix .. "quarantined", time, job.id)
    redis.call("ZREMRANGEBYSCORE", prefix .. "quarantined", "-inf", time - quarantine_ttl)
    for _, id in ipairs(redis.call("ZRANGE", prefix .. "quarantined", 0, -max_quarantined - 1)) do
        redis.call("ZREM", prefix .. "quarantined", id)
        redis.call("DEL", prefix .. "quarantined:" .. id)
    end
end

local function leave_queue(job)
    if job.state == "LEASED" then
        drop_lease(job)
        -- What the worker still sends is not its to send.
        redis.call("HDEL", job.key, "worker")
        revoked[job.worker] = true
    elseif job.entry then
        append(gone, job.queue, job.entry)
    else
        redis.call("ZREM", prefix .. "delayed", job.id)
        redis.call("LREM", prefix .. "parked:" .. submission_of(job.id).id, 1, job.id)
    end
end

for i = 6, #ARGV, 4 do
    local attempt, state, chunk = ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
    local job = read_job(ARGV[i])
    local open = job and (job.state == "QUEUED" or job.state == "LEASED")
    if open and (attempt == "" or attempt == job.attempt) then
        leave_queue(job)
        drop_chunks(job)
        if state == "QUARANTINED" then
            quarantine(job, now())
        end
        finish(job, state, chunk)
        outcome[#outcome + 1] = job.queue
    else
        outcome[#outcome + 1] = ""
    end
end
settle(ttl)
for worker in pairs(revoked) do
    redis.call("PUBLISH", prefix .. "revoked:" .. worker, "")
end
return outcome
