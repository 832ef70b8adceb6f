-- Takes over leases that were not renewed in time. A job goes back into the queue; one
-- that lost too many leases is held under the reaper's name, to be quarantined by
-- commit.lua (which also writes its result entry). If the caller dies in between, the
-- entry grows old again and the next reaper finds it.
--
-- KEYS[1] queue:<model>            stream  old entry deleted, new one added
-- also: job:<job>                  hash    state QUEUED, lost + 1, history
--       chunks:<job>:<attempt>     list    deleted: what was computed so far is void
-- publishes wake:<model>
--
-- ARGV: prefix, group, reaper, model, lease (ms), max lost, cursor, count, now (ms)
--
-- Returns {next cursor, number queued again, {{job id, attempt, history}, ...}}
local prefix, group, reaper, model = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local lease, max_lost = ARGV[5], tonumber(ARGV[6])
local cursor, count, now = ARGV[7], ARGV[8], ARGV[9]

local reply = redis.call("XAUTOCLAIM", KEYS[1], group, reaper, lease, cursor, "COUNT", count)
local requeued, condemned = 0, {}
for _, entry in ipairs(reply[2]) do
    -- Redis 6.2 lists deleted entries as nil; none of ours is deleted while pending.
    if entry then
        local id = entry[2][2]
        local key = prefix .. "job:" .. id
        local job = redis.call("HMGET", key, "state", "worker", "attempt", "lost", "history")
        if job[1] == "LEASED" then
            local lost, history = tonumber(job[4]), job[5] or ""
            redis.call("DEL", prefix .. "chunks:" .. id .. ":" .. job[3])
            if job[2] ~= reaper then
                lost = lost + 1
                history = history .. job[3] .. " " .. job[2] .. " " .. now .. "\n"
                redis.call("HSET", key, "lost", lost, "history", history)
            end
            if lost >= max_lost then
                redis.call("HSET", key, "worker", reaper)
                condemned[#condemned + 1] = {id, job[3], history}
            else
                redis.call("XACK", KEYS[1], group, entry[1])
                redis.call("XDEL", KEYS[1], entry[1])
                redis.call("HSET", key, "state", "QUEUED")
                redis.call("HDEL", key, "worker", "entry")
                redis.call("XADD", KEYS[1], "*", "j", id)
                requeued = requeued + 1
            end
        else
            redis.call("XACK", KEYS[1], group, entry[1])
            redis.call("XDEL", KEYS[1], entry[1])
        end
    end
end
if requeued > 0 then
    redis.call("PUBLISH", prefix .. "wake:" .. model, "")
end
return {reply[1], requeued, condemned}
