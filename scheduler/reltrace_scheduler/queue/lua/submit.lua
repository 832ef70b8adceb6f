-- Accepts the jobs of one submission, all or none, and once: the call may be repeated.
--
-- KEYS[1] idempotency:<tenant>:<key>  string  read; set to the submission's id
-- KEYS[2] submission:<sub>            hash    created
-- KEYS[3] load                        hash    jobs and bytes added
-- KEYS[4] tenant:<tenant>             hash    jobs and bytes added
-- KEYS[5] tenants                     set     the tenant added
-- also: queue:<class>:<tenant>:<model> stream an entry per job; queues, turns:<...>
--       job:<job>                     hash    created, one per job
--       deadlines                     zset    jobs with a timeout
-- publishes wake:<model>
--
-- ARGV: prefix, group, submission id, tenant, class, idempotency ttl (ms; 0: no key given),
--       digest of the jobs, bounds: jobs in all, bytes in all, the tenant's jobs, its
--       bytes; number of shards, of which each has an equal part of every bound; then per
--       job: route, timeout (ms; 0: none), spec
--
-- Returns {"accepted"} | {"seen", submission id, number of jobs} | {"differs"} |
--         {"full", "in all" or "of the tenant", jobs, bytes, bound on jobs, bound on bytes}
local sub, tenant, class, ttl, digest = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6]), ARGV[7]
local shards, first = tonumber(ARGV[12]), 13
local count = (#ARGV - first + 1) / 3

if ttl > 0 then
    local seen = redis.call("GET", KEYS[1])
    if seen then
        local id, jobs, had = string.match(seen, "^(%S+) (%d+) (%S+)$")
        if had ~= digest then
            return {"differs"}
        end
        return {"seen", id, tonumber(jobs)}
    end
end

-- The same call once more: its first answer came too late, and it was repeated.
if redis.call("EXISTS", KEYS[2]) == 1 then
    return {"accepted"}
end

local bytes = 0
for i = 0, count - 1 do
    bytes = bytes + #ARGV[first + 3 * i + 2]
end

-- Results that wait to be read take memory as the jobs do.
local function held(key, max_jobs, max_bytes)
    local load = redis.call("HMGET", key, "jobs", "bytes", "results", "max_jobs", "max_bytes")
    local jobs, held_bytes = tonumber(load[1] or 0), tonumber(load[2] or 0) + tonumber(load[3] or 0)
    max_jobs = math.ceil(tonumber(load[4] or max_jobs) / shards)
    max_bytes = math.ceil(tonumber(load[5] or max_bytes) / shards)
    local full = jobs + count > max_jobs or held_bytes + bytes > max_bytes
    return full, jobs, held_bytes, max_jobs, max_bytes
end

local full, jobs, used, max_jobs, max_bytes = held(KEYS[4], ARGV[10], ARGV[11])
if full then
    return {"full", "of the tenant", jobs, used, max_jobs, max_bytes}
end
full, jobs, used, max_jobs, max_bytes = held(KEYS[3], ARGV[8], ARGV[9])
if full then
    return {"full", "in all", jobs, used, max_jobs, max_bytes}
end

local time = now()
for i = 0, count - 1 do
    local at = first + 3 * i
    local model, timeout, spec = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2]
    local id = sub .. "-" .. i
    local name, entry = enqueue(id, class, tenant, model, #spec)
    local key = prefix .. "job:" .. id
    redis.call("HSET", key, "state", "QUEUED", "attempt", 0, "queue", name, "entry", entry,
        "spec", spec, "bytes", #spec, "queued_at", time)
    if timeout > 0 then
        redis.call("HSET", key, "due", time + timeout)
        redis.call("ZADD", prefix .. "deadlines", time + timeout, id)
    end
end
redis.call("HSET", KEYS[2], "tenant", tenant, "jobs", count, "ended", 0)
redis.call("SADD", KEYS[5], tenant)
charge(tenant, count, bytes, 0)
if ttl > 0 then
    redis.call("SET", KEYS[1], sub .. " " .. count .. " " .. digest, "PX", ttl)
    redis.call("HSET", KEYS[2], "key", KEYS[1])
end
settle(0)
return {"accepted"}
