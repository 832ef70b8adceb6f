-- Keeps drafts of texts that are being written, for whoever reads along. A hint: a draft is
-- dropped where its lease is lost, or where there are too many. They go with the lease
-- (drop_lease() in common.lua), so that nothing is left of them when the job ends.
--
-- also: job:<job>      hash    drafted: bytes of what the present attempt drafted
--       draft:<job>    stream  a draft added, as entry <attempt>-<drafted>
-- publishes done:<sub>
--
-- ARGV: prefix, group, worker, time to live (ms), most bytes of an attempt, bytes that a draft
--       counts for beside its own, then per draft: job id, attempt, draft
--
-- Returns how many were kept.
local worker, ttl, most, each = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local kept, told = 0, {}

for i = 7, #ARGV, 3 do
    local row = prefix .. "job:" .. ARGV[i]
    local job = redis.call("HMGET", row, "state", "worker", "attempt", "drafted")
    local bytes = tonumber(job[4] or 0) + #ARGV[i + 2] + each
    if job[1] == "LEASED" and job[2] == worker and job[3] == ARGV[i + 1] and bytes <= most then
        local key = prefix .. "draft:" .. ARGV[i]
        -- By attempt and bytes, not by the clock: a reader's position holds for the next attempt.
        redis.call("XADD", key, job[3] .. "-" .. bytes, "d", ARGV[i + 2])
        redis.call("PEXPIRE", key, ttl)
        redis.call("HSET", row, "drafted", bytes)
        told[string.match(ARGV[i], "^(.+)%-%d+$")] = true
        kept = kept + 1
    end
end
for sub in pairs(told) do
    redis.call("PUBLISH", prefix .. "done:" .. sub, "")
end
return kept
