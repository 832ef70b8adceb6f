-- Forgets routes that no worker has served for long, and those that an operator names if no worker
-- serves them at present. Jobs for them are ended by the caller.
--
-- Keys: models and served (fields and members removed; served: times set), serving:<route> (read).
--
-- ARGV: prefix, time without a worker after which a route is forgotten (ms), time without a heartbeat
--       after which a worker does not count (ms); then names: of routes, or of models for all their
--       revisions
--
-- Returns the routes that were forgotten.
local ttl, lease = tonumber(ARGV[2]), tonumber(ARGV[3])
local time = now()
go_on_when_full()

local function is_named(route)
    for i = 4, #ARGV do
        local name = ARGV[i]
        if route == name or string.sub(route, 1, #name + 1) == name .. "@" then
            return true
        end
    end
    return false
end

local forgotten = {}
for _, route in ipairs(redis.call("HKEYS", key.models)) do
    local at = tonumber(redis.call("ZSCORE", key.served, route))
    -- Workers are noted by seconds.
    if redis.call("ZCOUNT", prefix.serving .. route, (time - lease) / 1000, "+inf") > 0 then
        redis.call("ZADD", key.served, time, route)
    elseif is_named(route) or (at and at < time - ttl) then
        redis.call("HDEL", key.models, route)
        redis.call("ZREM", key.served, route)
        forgotten[#forgotten + 1] = route
    elseif not at then
        redis.call("ZADD", key.served, time, route)
    end
end
return forgotten
