-- Notes that a worker is alive: it was seen now.
--
-- KEYS: worker:<id> (silent set or deleted; draining read). Also: workers and serving:<route> (the
-- worker's time, where it is a member).
--
-- ARGV: prefix, worker, seconds for which it has stood still ("0": it has not), then its routes
--
-- Returns 1 where it was told to drain, else 0.
local worker, silent = ARGV[2], ARGV[3]
local time = now() / 1000
go_on_when_full()
redis.call("ZADD", key.workers, "XX", time, worker)
for i = 4, #ARGV do
    redis.call("ZADD", prefix.serving .. ARGV[i], "XX", time, worker)
end
if silent == "0" then
    redis.call("HDEL", KEYS[1], "silent")
else
    redis.call("HSET", KEYS[1], "silent", silent)
end
return redis.call("HEXISTS", KEYS[1], "draining")
