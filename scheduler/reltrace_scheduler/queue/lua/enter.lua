-- Enters a worker's session, and in the first shard the worker and its models.
--
-- KEYS: worker:<id> (epoch; in the first shard also hello, routes, connected_at). Also, in the first
-- shard: models (fields set), serving:<route> and workers (the worker added, seen now).
--
-- ARGV: prefix, worker, epoch; in the first shard also hello, then per route: route, ModelInfo
local worker, epoch, hello = ARGV[2], ARGV[3], ARGV[4]
go_on_when_full()
redis.call("HSET", KEYS[1], "epoch", epoch)
if hello then
    local seen, routes = now() / 1000, {}
    for i = 5, #ARGV, 2 do
        routes[#routes + 1] = ARGV[i]
        redis.call("HSET", key.models, ARGV[i], ARGV[i + 1])
        redis.call("ZADD", prefix.serving .. ARGV[i], seen, worker)
    end
    redis.call("HSET", KEYS[1],
        "hello", hello, "routes", table.concat(routes, "\n"), "connected_at", seen)
    redis.call("ZADD", key.workers, seen, worker)
end
