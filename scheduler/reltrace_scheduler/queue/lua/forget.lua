-- Forgets a worker that is gone. Its consumers are deleted only where nothing is pending
-- for them: deleting one with pending entries would lose them.
--
-- KEYS[1] queues                          set     read
-- KEYS[2] workers                         zset    member removed
-- KEYS[3] worker:<id>                     hash    deleted
-- also: queue:<class>:<tenant>:<model>    stream  consumer deleted
--       serving:<route>                   zset    member removed
--
-- ARGV: prefix, group, worker, epoch ("": any), seen before (s): a worker seen since then
--       stays; "" forgets anyway
--
-- Returns 1 forgotten, 0 not.
local worker, epoch, before = ARGV[3], ARGV[4], ARGV[5]
local seen = redis.call("ZSCORE", KEYS[2], worker)
if before ~= "" and seen and tonumber(seen) >= tonumber(before) then
    return 0
end
if epoch ~= "" and redis.call("HGET", KEYS[3], "epoch") ~= epoch then
    return 0
end
redis.call("ZREM", KEYS[2], worker)
for route in string.gmatch(redis.call("HGET", KEYS[3], "routes") or "", "[^\n]+") do
    redis.call("ZREM", prefix .. "serving:" .. route, worker)
end
redis.call("DEL", KEYS[3])
for _, name in ipairs(redis.call("SMEMBERS", KEYS[1])) do
    local queue = prefix .. "queue:" .. name
    if #redis.call("XPENDING", queue, group, "-", "+", 1, worker) == 0 then
        redis.call("XGROUP", "DELCONSUMER", queue, group, worker)
    end
end
return 1
