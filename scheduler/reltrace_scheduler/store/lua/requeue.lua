-- Queues leased jobs again at once, because their worker hands them back.
--
-- KEYS[1] queue:<model>            stream  old entry deleted, new one added
-- also: job:<job>                  hash    state QUEUED
--       chunks:<job>:<attempt>     list    deleted: what was computed so far is void
-- publishes wake:<model>
--
-- ARGV: prefix, group, worker, model, then per lease: job id, attempt
--
-- Returns how many were queued again.
local prefix, group, worker, model = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local count = 0

for i = 5, #ARGV, 2 do
    local id, attempt = ARGV[i], ARGV[i + 1]
    local key = prefix .. "job:" .. id
    local job = redis.call("HMGET", key, "state", "worker", "attempt", "entry")
    if job[1] == "LEASED" and job[2] == worker and job[3] == attempt then
        redis.call("XACK", KEYS[1], group, job[4])
        redis.call("XDEL", KEYS[1], job[4])
        redis.call("DEL", prefix .. "chunks:" .. id .. ":" .. attempt)
        redis.call("HSET", key, "state", "QUEUED")
        redis.call("HDEL", key, "worker", "entry")
        redis.call("XADD", KEYS[1], "*", "j", id)
        count = count + 1
    end
end
if count > 0 then
    redis.call("PUBLISH", prefix .. "wake:" .. model, "")
end
return count
