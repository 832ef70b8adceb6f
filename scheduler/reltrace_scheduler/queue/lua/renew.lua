-- Renews leases: the idle time of their pending entries starts again, and no delivery is counted
-- (JUSTID).
--
-- Touches job:<job> (read), queue:<...> (pending entries are claimed anew).
--
-- ARGV: prefix, worker, then per lease: job id, attempt
--
-- Returns per lease: 1 renewed, 0 not the worker's any more.
local worker = ARGV[2]
local outcome, held = {}, {}

for i = 3, #ARGV, 2 do
    local job = redis.call("HMGET", prefix.job .. ARGV[i],
        "state", "worker", "attempt", "queue", "entry")
    local code = 0
    if job[1] == "LEASED" and job[2] == worker and job[3] == ARGV[i + 1] then
        append(held, job[4], job[5])
        code = 1
    end
    outcome[#outcome + 1] = code
end
for queue, entries in pairs(held) do
    call_many({"XCLAIM", prefix.queue .. queue, GROUP, worker, 0}, entries, "JUSTID")
end
return outcome
