-- Accepts the jobs of one submission, all or none, and once: the call may be repeated.
--
-- KEYS: idempotency:<tenant>:<key> (read; set to submission, number of jobs, digest),
-- submission:<sub> (created), tenant:<tenant> (jobs and bytes added). Also: load (the same), tenants
-- (tenant added), throttled_tenants and readers (a tenant that is refused because of its unread
-- results), deadlines (jobs with a timeout), job:<job> (created), and what enqueue() does.
-- Publishes wake:<model>.
--
-- ARGV: prefix, submission id, tenant, class, idempotency ttl (ms; 0: no key given), digest of the
--       jobs; bounds: jobs in all, bytes in all, the tenant's jobs, its bytes; number of shards, of
--       which each has an equal part of every bound; then per job: route, timeout (ms; 0: none),
--       spec, most bytes of its result (0: not known)
--
-- Returns {"accepted"} | {"seen", submission id, number of jobs} | {"differs"} |
--         {"full", "of all tenants" or "of the tenant", jobs, bytes, bound on jobs, bound on bytes,
--          bytes of them that are unread results} |
--         {"too_large", the same}: not even an empty queue has room for it
local id, tenant, class, ttl, digest = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local shards, first = tonumber(ARGV[11]), 12
local count = (#ARGV - first + 1) / 4

-- The same call again, because its first answer came too late.
if redis.call("EXISTS", KEYS[2]) == 1 then
    return {"accepted"}
end

if ttl > 0 then
    local seen = redis.call("GET", KEYS[1])
    if seen then
        local earlier, jobs, earlier_digest = string.match(seen, "^(%S+) (%d+) (%S+)$")
        if earlier_digest ~= digest then
            return {"differs"}
        end
        return {"seen", earlier, tonumber(jobs)}
    end
end

local bytes = 0
for i = 0, count - 1 do
    bytes = bytes + #ARGV[first + 4 * i + 2]
end

-- Returns what is held, and its bounds. Unread results take memory as jobs do.
local function read_load(name, whose, max_jobs, max_bytes)
    local load = redis.call("HMGET", name, "jobs", "bytes", "results", "max_jobs", "max_bytes")
    return {
        whose, tonumber(load[1] or 0), tonumber(load[2] or 0) + tonumber(load[3] or 0),
        math.ceil(tonumber(load[4] or max_jobs) / shards),
        math.ceil(tonumber(load[5] or max_bytes) / shards), tonumber(load[3] or 0),
    }
end

local loads_held = {
    read_load(KEYS[3], "of the tenant", ARGV[9], ARGV[10]),
    read_load(key.load, "of all tenants", ARGV[7], ARGV[8]),
}
for _, load in ipairs(loads_held) do
    if count > load[4] or bytes > load[5] then
        return {"too_large", unpack(load)}
    end
end
for _, load in ipairs(loads_held) do
    if load[2] + count > load[4] or load[3] + bytes > load[5] then
        if load == loads_held[1] and load[6] > 0 then
            local time = now()
            redis.call("ZADD", key.throttled_tenants, "NX", time, tenant)
            redis.call("ZADD", key.readers, time, ":" .. tenant)
        end
        return {"full", unpack(load)}
    end
end

local time = now()
for i = 0, count - 1 do
    local at = first + 4 * i
    local model, timeout, spec = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2]
    local result = tonumber(ARGV[at + 3])
    local job_id = id .. "-" .. i
    local name, entry = enqueue(job_id, class, tenant, model, #spec, result)
    local job = prefix.job .. job_id
    redis.call("HSET", job, "state", "QUEUED", "attempt", 0, "queue", name, "entry", entry,
        "spec", spec, "bytes", #spec, "result", result, "queued_at", time)
    if timeout > 0 then
        redis.call("HSET", job, "due", time + timeout)
        redis.call("ZADD", key.deadlines, time + timeout, job_id)
    end
end
redis.call("HSET", KEYS[2], "tenant", tenant, "jobs", count, "ended", 0)
redis.call("SADD", key.tenants, tenant)
charge(tenant, count, bytes, 0)
if ttl > 0 then
    redis.call("SET", KEYS[1], id .. " " .. count .. " " .. digest, "PX", ttl)
    redis.call("HSET", KEYS[2], "key", KEYS[1])
end
flush(0)
return {"accepted"}
