-- Forgets a worker that is gone. Its consumer is deleted only when nothing is pending
-- for it: deleting it with pending entries would lose them.
--
-- KEYS[1] queue:<model>   stream  consumer deleted
-- KEYS[2] workers         zset    member removed
-- KEYS[3] worker:<id>     hash    deleted
--
-- ARGV: group, worker, seen before (ms): a worker seen since then stays; "" forgets anyway
--
-- Returns 1 forgotten, 0 not.
local group, worker, before = ARGV[1], ARGV[2], ARGV[3]
local seen = redis.call("ZSCORE", KEYS[2], worker)
if before ~= "" and seen and tonumber(seen) >= tonumber(before) then
    return 0
end
redis.call("ZREM", KEYS[2], worker)
redis.call("DEL", KEYS[3])
if redis.call("EXISTS", KEYS[1]) == 1 then
    local pending = redis.call("XPENDING", KEYS[1], group, "-", "+", 1, worker)
    if #pending == 0 then
        redis.call("XGROUP", "DELCONSUMER", KEYS[1], group, worker)
    end
end
return 1
