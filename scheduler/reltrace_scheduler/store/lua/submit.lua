-- Accepts the jobs of one submission, all or none.
--
-- KEYS[1] idempotency:<key>   string  read; set to the submission's id
-- KEYS[2] submission:<sub>    hash    created
-- KEYS[3] load                hash    jobs and bytes added
-- KEYS[4..] queue:<model>     stream  an entry per job
-- also: job:<job>             hash    created, one per job
-- publishes wake:<model>
--
-- ARGV: prefix, submission id, idempotency ttl (ms; 0: no key given), max jobs, max bytes,
--       now (ms), then per job: index of its queue in KEYS, model, spec
--
-- Returns {"accepted"} | {"seen", submission id, number of jobs} |
--         {"full", queued jobs, queued bytes}
local prefix, sub, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
local max_jobs, max_bytes, now = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local first = 7
local count = (#ARGV - first + 1) / 3

if ttl > 0 then
    local seen = redis.call("GET", KEYS[1])
    if seen then
        local id, jobs = string.match(seen, "^(%S+) (%d+)$")
        return {"seen", id, tonumber(jobs)}
    end
end

local bytes = 0
for i = 0, count - 1 do
    bytes = bytes + #ARGV[first + 3 * i + 2]
end
local load = redis.call("HMGET", KEYS[3], "jobs", "bytes")
local held_jobs, held_bytes = tonumber(load[1] or 0), tonumber(load[2] or 0)
if held_jobs + count > max_jobs or held_bytes + bytes > max_bytes then
    return {"full", held_jobs, held_bytes}
end

local woken = {}
for i = 0, count - 1 do
    local at = first + 3 * i
    local queue, model, spec = KEYS[tonumber(ARGV[at])], ARGV[at + 1], ARGV[at + 2]
    local job = sub .. "-" .. i
    redis.call("HSET", prefix .. "job:" .. job,
        "state", "QUEUED", "attempt", 0, "lost", 0, "model", model,
        "spec", spec, "bytes", #spec, "queued_at", now)
    redis.call("XADD", queue, "*", "j", job)
    woken[model] = true
end
redis.call("HSET", KEYS[2], "jobs", count, "ended", 0)
redis.call("HINCRBY", KEYS[3], "jobs", count)
redis.call("HINCRBY", KEYS[3], "bytes", bytes)
if ttl > 0 then
    redis.call("SET", KEYS[1], sub .. " " .. count, "PX", ttl)
end
for model in pairs(woken) do
    redis.call("PUBLISH", prefix .. "wake:" .. model, "")
end
return {"accepted"}
