-- Takes over leases of one queue that were not renewed in time. A job is queued again; one that
-- lost too many leases is held under the reaper's name, until end.lua quarantines it. If the
-- caller dies in between, the entry grows old again and the next reaper finds it. A queue that is
-- empty is deleted.
--
-- KEYS: queue:<...> (old entries deleted). Also: queues (an empty queue removed), watchdog (read),
-- job:<job> (state QUEUED, lost + 1, history), queue:isolate_group:<...> and
-- queue:isolate_single:<...> (new entries), held:<worker> (jobs removed), chunks:<job>:<attempt> and
-- draft:<job> (deleted), submission:<sub>, load, tenant:<tenant> (their bytes taken off),
-- vt_active:<...>, vt_idle:<...>, virtual_time (entries of an empty queue removed). Publishes
-- wake:<model>.
--
-- ARGV: prefix, name of the queue, lease (ms), most lost leases, cursor, count
--
-- Returns {next cursor, number queued again, {{job id, attempt, history}, ...}}
local name, lease, max_lost, cursor, count = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]

go_on_when_full()
local time = now()
local watchdog = redis.call("HMGET", key.watchdog, "seen", "grace")
-- This may be a call that waited while Redis was away: then the watchdog has not ticked since.
if watchdog[1] and (time - watchdog[1] > lease / 2 or time < tonumber(watchdog[2])) then
    return {"0-0", 0, {}}
end
if redis.call("EXISTS", KEYS[1]) == 0 then
    redis.call("SREM", key.queues, name)
    return {"0-0", 0, {}}
end
local reply = redis.call("XAUTOCLAIM", KEYS[1], GROUP, REAPER, lease, cursor, "COUNT", count)
local requeued, candidates = 0, {}
for _, entry in ipairs(reply[2]) do
    -- Redis 6.2 lists deleted entries as nil; none of ours is deleted while pending.
    local job = entry and read_job(entry[2][2])
    if job and job.state == "LEASED" and job.entry == entry[1] then
        local row = redis.call("HMGET", job.key, "lost", "history")
        local lost, history = tonumber(row[1] or 0), row[2] or ""
        if job.worker ~= REAPER then
            lost = lost + 1
            history = history .. job.attempt .. " " .. job.worker .. " " .. time .. "\n"
            redis.call("HSET", job.key, "lost", lost, "history", history)
        end
        if lost >= max_lost then
            discard_chunks(job)
            append(released_jobs, job.worker, job.id)
            redis.call("HSET", job.key, "worker", REAPER)
            candidates[#candidates + 1] = {job.id, job.attempt, history}
        else
            release(job, lost == 1 and "isolate_group" or "isolate_single")
            requeued = requeued + 1
        end
    elseif job and job.state == "QUEUED" and job.entry == entry[1] then
        -- Read, and not leased: the call that read it broke off.
        append(removed_entries, name, entry[1])
        requeue(job)
        requeued = requeued + 1
    elseif entry then
        append(removed_entries, name, entry[1])
    end
end
flush(0)
if redis.call("XLEN", KEYS[1]) == 0 then
    local class, tenant, model = split(name)
    redis.call("DEL", KEYS[1])
    redis.call("SREM", key.queues, name)
    redis.call("HDEL", key.virtual_time, "large:" .. name, "result:" .. name)
    deactivate(class, tenant, model)
end
return {reply[1], requeued, candidates}
