-- Renews leases: the idle time of their pending entries starts again, and no delivery is counted
-- (JUSTID).
--
-- Touches job:<job> (read), queue:<...> (pending entries are claimed anew), and what drop() does.
--
-- ARGV: prefix, worker, whether to renew (1) or only to check (0), then per lease: job id, attempt
--
-- Returns per lease: 1 held by the worker, 0 not any more.
local worker, renew = ARGV[2], ARGV[3] == "1"
local outcome, held = {}, {}

for i = 4, #ARGV, 2 do
    local job = read_leased(ARGV[i], worker, ARGV[i + 1])
    if job and renew then
        append(held, job.queue, job.entry)
    end
    outcome[#outcome + 1] = job and 1 or 0
end
for queue, entries in pairs(held) do
    call_many({"XCLAIM", prefix.queue .. queue, GROUP, worker, 0}, entries, "JUSTID")
end
flush(0)
return outcome
