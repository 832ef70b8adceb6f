-- Renews leases: the idle time of their pending entries starts again, and no
-- delivery is counted (JUSTID).
--
-- KEYS[1] queue:<model>   stream  pending entries are claimed anew
-- also: job:<job>         hash    read
--
-- ARGV: prefix, group, worker, then per lease: job id, attempt
--
-- Returns the numbers (from 1) of the leases that the worker does not hold any more.
local prefix, group, worker = ARGV[1], ARGV[2], ARGV[3]
local gone, held = {}, {}

for i = 4, #ARGV, 2 do
    local job = redis.call("HMGET", prefix .. "job:" .. ARGV[i],
        "state", "worker", "attempt", "entry")
    if job[1] == "LEASED" and job[2] == worker and job[3] == ARGV[i + 1] then
        held[#held + 1] = job[4]
    else
        gone[#gone + 1] = (i - 2) / 2
    end
end
-- unpack() is bounded by Lua's stack.
for i = 1, #held, 500 do
    local args = {}
    for k = i, math.min(i + 499, #held) do
        args[#args + 1] = held[k]
    end
    args[#args + 1] = "JUSTID"
    redis.call("XCLAIM", KEYS[1], group, worker, 0, unpack(args))
end
return gone
