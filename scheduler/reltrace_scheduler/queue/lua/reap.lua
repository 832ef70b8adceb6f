-- Takes over leases of one queue that were not renewed in time. A job goes back into a
-- queue; one that lost too many leases is held under the reaper's name, to be ended by
-- end.lua (which also writes its result). If the caller dies in between, the entry grows
-- old again and the next reaper finds it. A queue that is empty is deleted.
--
-- KEYS[1] queue:<class>:<tenant>:<model>  stream  old entries deleted
-- KEYS[2] queues                          set     an empty queue removed
-- KEYS[3] watch                           hash    read
-- also: job:<job>                         hash    state QUEUED, lost + 1, history
--       queue:suspect:..., queue:alone:... stream new entries
--       held:<worker>                     set     the jobs removed
--       chunks:<job>:<attempt>            list    deleted: what was computed so far is void
--       draft:<job>                       stream  deleted
--       submission:<sub>, load, tenant:<tenant>  hash  bytes of those chunks taken off
--       turns:<class>:<model>, turned:... zset    the tenant of an empty queue removed
--       clock                             hash    what is noted of an empty queue removed
-- publishes wake:<model>
--
-- ARGV: prefix, group, reaper, name of the queue, lease (ms), most lost leases, cursor, count
--
-- Returns {next cursor, number queued again, {{job id, attempt, history}, ...}}
local reaper, name = ARGV[3], ARGV[4]
local lease, max_lost, cursor, count = ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8]

local time = now()
local watch = redis.call("HMGET", KEYS[3], "seen", "grace")
-- This may be a call that waited while Redis was away: then no look has come since.
if watch[1] and (time - watch[1] > lease / 2 or time < tonumber(watch[2])) then
    return {"0-0", 0, {}}
end
if redis.call("EXISTS", KEYS[1]) == 0 then
    redis.call("SREM", KEYS[2], name)
    return {"0-0", 0, {}}
end
local reply = redis.call("XAUTOCLAIM", KEYS[1], group, reaper, lease, cursor, "COUNT", count)
local requeued, condemned = 0, {}
for _, entry in ipairs(reply[2]) do
    -- Redis 6.2 lists deleted entries as nil; none of ours is deleted while pending.
    local job = entry and read_job(entry[2][2])
    if job and job.state == "LEASED" and job.entry == entry[1] then
        local row = redis.call("HMGET", job.key, "lost", "history")
        local lost, history = tonumber(row[1] or 0), row[2] or ""
        drop_chunks(job)
        if job.worker ~= reaper then
            lost = lost + 1
            history = history .. job.attempt .. " " .. job.worker .. " " .. time .. "\n"
            redis.call("HSET", job.key, "lost", lost, "history", history)
        end
        if lost >= max_lost then
            append(dropped, job.worker, job.id)
            redis.call("HSET", job.key, "worker", reaper)
            condemned[#condemned + 1] = {job.id, job.attempt, history}
        else
            drop_lease(job)
            requeue(job, lost == 1 and "suspect" or "alone")
            requeued = requeued + 1
        end
    elseif job and job.state == "QUEUED" and job.entry == entry[1] then
        -- Read, and not leased: the call that read it broke off.
        append(gone, name, entry[1])
        requeue(job)
        requeued = requeued + 1
    elseif entry then
        append(gone, name, entry[1])
    end
end
settle(0)
if redis.call("XLEN", KEYS[1]) == 0 then
    local class, tenant, model = split(name)
    redis.call("DEL", KEYS[1])
    redis.call("SREM", KEYS[2], name)
    redis.call("HDEL", prefix .. "clock", "large:" .. name)
    leave_turns(class, tenant, model)
end
return {reply[1], requeued, condemned}
