-- Renews leases: the idle time of their pending entries starts again, and no
-- delivery is counted (JUSTID).
--
-- also: job:<job>                       hash    read
--       queue:<class>:<tenant>:<model>  stream  pending entries are claimed anew
--
-- ARGV: prefix, group, worker, then per lease: job id, attempt
--
-- Returns the numbers (from 1) of the leases that the worker does not hold any more.
local worker = ARGV[3]
local lost, held = {}, {}

for i = 4, #ARGV, 2 do
    local job = redis.call("HMGET", prefix .. "job:" .. ARGV[i],
        "state", "worker", "attempt", "queue", "entry")
    if job[1] == "LEASED" and job[2] == worker and job[3] == ARGV[i + 1] then
        append(held, job[4], job[5])
    else
        lost[#lost + 1] = (i - 2) / 2
    end
end
for queue, entries in pairs(held) do
    call_many({"XCLAIM", prefix .. "queue:" .. queue, group, worker, 0}, entries, "JUSTID")
end
return lost
