-- Leases up to `count` queued jobs to a worker. The attempt counts up: it is the
-- fencing token of the lease.
--
-- KEYS[1] queue:<model>   stream  entries become pending for the worker
-- also: job:<job>         hash    state LEASED, attempt + 1, worker, entry
--
-- ARGV: prefix, group, worker, count
--
-- Returns {{job id, attempt, spec, queued_at}, ...}
local prefix, group, worker, count = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local leased = {}

while #leased < count do
    local reply = redis.call("XREADGROUP", "GROUP", group, worker,
        "COUNT", count - #leased, "STREAMS", KEYS[1], ">")
    if not reply then
        break
    end
    for _, entry in ipairs(reply[1][2]) do
        local id, job = entry[1], entry[2][2]
        local key = prefix .. "job:" .. job
        local held = redis.call("HMGET", key, "state", "spec", "queued_at")
        if held[1] == "QUEUED" then
            local attempt = redis.call("HINCRBY", key, "attempt", 1)
            redis.call("HSET", key, "state", "LEASED", "worker", worker, "entry", id)
            leased[#leased + 1] = {job, attempt, held[2], held[3]}
        else
            -- A tombstone: the job ended while it was queued. Deleting it before it
            -- was delivered would have cost the group its lag.
            redis.call("XACK", KEYS[1], group, id)
            redis.call("XDEL", KEYS[1], id)
        end
    end
end
return leased
