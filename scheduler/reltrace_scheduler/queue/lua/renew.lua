-- Renews leases: the idle time of their pending entries starts again, and no delivery is counted
-- (JUSTID).
--
-- Touches job:<job> (read), queue:<...> (pending entries are claimed anew).
--
-- ARGV: prefix, worker, whether to renew (1) or only to check (0), then per lease: job id, attempt
--
-- Returns per lease: 1 held by the worker, 0 not any more.
local worker, renew = ARGV[2], ARGV[3] == "1"
local outcome, held = {}, {}

for i = 4, #ARGV, 2 do
    local job = redis.call("HMGET", prefix.job .. ARGV[i],
        "state", "worker", "attempt", "queue", "entry")
    local is_held = job[1] == "LEASED" and job[2] == worker and job[3] == ARGV[i + 1]
    if is_held and renew then
        append(held, job[4], job[5])
    end
    outcome[#outcome + 1] = is_held and 1 or 0
end
for queue, entries in pairs(held) do
    call_many({"XCLAIM", prefix.queue .. queue, GROUP, worker, 0}, entries, "JUSTID")
end
return outcome
