-- Forgets tenants that hold nothing and have no limits, of one page of all. What is still reserved
-- for results of a tenant without leases is given up: a scheduler that ends a lease without knowing
-- of reservations, because it is of a version before them, leaves its own behind, and jobs that wait
-- could wait for that for ever.
--
-- Keys: tenants and throttled_tenants (members removed), tenant:<tenant> (deleted), load (reserved),
-- queues and queue:<...> (read).
--
-- ARGV: prefix, cursor ("0": the first page)
--
-- Returns the cursor of the next page; "0": there is none.
local tenants_with_leases
local function has_leases(tenant)
    if not tenants_with_leases then
        tenants_with_leases = {}
        for _, queue in ipairs(redis.call("SMEMBERS", key.queues)) do
            local _, owner = split(queue)
            local pending = redis.pcall("XPENDING", prefix.queue .. queue, GROUP)
            -- An error: the queue is gone.
            if not pending.err and pending[1] > 0 then
                tenants_with_leases[owner] = true
            end
        end
    end
    return tenants_with_leases[tenant]
end

local page = redis.call("SSCAN", key.tenants, ARGV[2], "COUNT", 500)
for _, tenant in ipairs(page[2]) do
    local name = prefix.tenant .. tenant
    local fields = redis.call("HMGET", name,
        "jobs", "bytes", "results", "weight", "max_jobs", "max_bytes", "reserved")
    local left = tonumber(fields[7] or 0)
    if left ~= 0 and not has_leases(tenant) then
        redis.call("HINCRBY", key.load, "reserved", -left)
        redis.call("HDEL", name, "reserved")
    end
    local is_empty = not (fields[4] or fields[5] or fields[6])
    for i = 1, 3 do
        is_empty = is_empty and tonumber(fields[i] or 0) == 0
    end
    if is_empty then
        redis.call("SREM", key.tenants, tenant)
        redis.call("ZREM", key.throttled_tenants, tenant)
        redis.call("DEL", name)
    end
end
return page[1]
