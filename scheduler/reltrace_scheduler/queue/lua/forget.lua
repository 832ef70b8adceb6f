-- Forgets a worker that is gone. Its consumers are deleted only where nothing is pending for them:
-- deleting one with pending entries would lose them.
--
-- KEYS: worker:<id> (deleted). Also: queues (read), workers and serving:<route> (member removed),
-- queue:<...> (consumer deleted).
--
-- ARGV: prefix, worker, epoch ("": any), time (ms) within which a worker that was seen stays; "": it
--       is forgotten anyway
--
-- Returns 1 forgotten, 0 not.
local worker, epoch, ttl = ARGV[2], ARGV[3], ARGV[4]
local seen = redis.call("ZSCORE", key.workers, worker)
if ttl ~= "" and seen and tonumber(seen) >= (now() - ttl) / 1000 then
    return 0
end
if epoch ~= "" and redis.call("HGET", KEYS[1], "epoch") ~= epoch then
    return 0
end
redis.call("ZREM", key.workers, worker)
for route in string.gmatch(redis.call("HGET", KEYS[1], "routes") or "", "[^\n]+") do
    redis.call("ZREM", prefix.serving .. route, worker)
end
redis.call("DEL", KEYS[1])
for _, name in ipairs(redis.call("SMEMBERS", key.queues)) do
    local queue = prefix.queue .. name
    if redis.call("EXISTS", queue) == 1
            and #redis.call("XPENDING", queue, GROUP, "-", "+", 1, worker) == 0 then
        redis.call("XGROUP", "DELCONSUMER", queue, GROUP, worker)
    end
end
return 1
