-- Ends jobs that no worker ends: cancelled, past their timeout, or to be quarantined. What they
-- were doing is void; their result is one chunk that says why.
--
-- Touches what commit.lua does, and delayed, backpressured:<sub> (job removed), quarantined and
-- quarantined:<job> (added). Publishes done:<sub>, revoked:<worker>.
--
-- ARGV: prefix, result ttl (ms), how many quarantined jobs are kept, for how long (ms), then per
--       job: job id, attempt ("": any), state, chunk
--
-- Returns per job the name of the queue that it was in, or "" where this did not end it: it had
-- ended, is unknown, or is at another attempt.
local ttl, max_quarantined, quarantine_ttl = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local outcome, revoked = {}, {}

local function quarantine(job)
    local time = now()
    local row = redis.call("HMGET", job.key, "spec", "history", "priority")
    local name = prefix.quarantined .. job.id
    redis.call("HSET", name, "tenant", submission_of(job.id).tenant, "spec", row[1],
        "history", row[2] or "", "priority", row[3] or split(job.queue))
    redis.call("PEXPIRE", name, quarantine_ttl)
    redis.call("ZADD", key.quarantined, time, job.id)
    redis.call("ZREMRANGEBYSCORE", key.quarantined, "-inf", time - quarantine_ttl)
    for _, id in ipairs(redis.call("ZRANGE", key.quarantined, 0, -max_quarantined - 1)) do
        redis.call("ZREM", key.quarantined, id)
        redis.call("DEL", prefix.quarantined .. id)
    end
end

local function leave_queue(job)
    if job.state == "LEASED" then
        end_lease(job)
        -- The worker can not store a result of it any more.
        redis.call("HDEL", job.key, "worker")
        revoked[job.worker] = true
    elseif job.entry then
        append(removed_entries, job.queue, job.entry)
    else
        redis.call("ZREM", key.delayed, job.id)
        redis.call("LREM", prefix.backpressured .. submission_id(job.id), 1, job.id)
    end
end

go_on_when_full()
for i = 5, #ARGV, 4 do
    local attempt, state, chunk = ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
    local job = read_job(ARGV[i])
    local open = job and (job.state == "QUEUED" or job.state == "LEASED")
    if open and (attempt == "" or attempt == job.attempt) then
        leave_queue(job)
        discard_chunks(job)
        if state == "QUARANTINED" then
            quarantine(job)
        end
        finish(job, state, chunk)
        outcome[#outcome + 1] = job.queue
    else
        if not job then
            redis.call("ZREM", key.deadlines, ARGV[i])
        end
        outcome[#outcome + 1] = ""
    end
end
flush(ttl)
for worker in pairs(revoked) do
    redis.call("PUBLISH", prefix.revoked .. worker, "")
end
return outcome
