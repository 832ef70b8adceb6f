-- Keeps drafts of texts that are being written, for whoever reads along. A hint: a draft is
-- dropped where its lease is lost, or where there are too many.
--
-- also: job:<job>      hash   read
--       draft:<job>    list   a draft added; gone after a while
-- publishes done:<sub>
--
-- ARGV: prefix, group, worker, time to live (ms), most drafts of a job, then per draft:
--       job id, attempt, draft
--
-- Returns how many were kept.
local worker, ttl, most = ARGV[3], ARGV[4], tonumber(ARGV[5])
local kept, told = 0, {}

for i = 6, #ARGV, 3 do
    local job = redis.call("HMGET", prefix .. "job:" .. ARGV[i], "state", "worker", "attempt")
    local key = prefix .. "draft:" .. ARGV[i]
    if job[1] == "LEASED" and job[2] == worker and job[3] == ARGV[i + 1]
        and redis.call("LLEN", key) < most then
        redis.call("RPUSH", key, ARGV[i + 2])
        redis.call("PEXPIRE", key, ttl)
        told[string.match(ARGV[i], "^(.+)%-%d+$")] = true
        kept = kept + 1
    end
end
for sub in pairs(told) do
    redis.call("PUBLISH", prefix .. "done:" .. sub, "")
end
return kept
