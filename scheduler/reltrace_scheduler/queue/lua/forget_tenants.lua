-- Forgets tenants that hold nothing and have no limits, of one page of all. What is still reserved
-- for results of a tenant without jobs is given up: a scheduler that ends a lease without knowing of
-- reservations, because it is of a version before them, leaves its own behind.
--
-- Keys: tenants and throttled_tenants (members removed), tenant:<tenant> (deleted), load (reserved).
--
-- ARGV: prefix, cursor ("0": the first page)
--
-- Returns the cursor of the next page; "0": there is none.
local page = redis.call("SSCAN", key.tenants, ARGV[2], "COUNT", 500)
for _, tenant in ipairs(page[2]) do
    local name = prefix.tenant .. tenant
    local fields = redis.call("HMGET", name,
        "jobs", "bytes", "results", "weight", "max_jobs", "max_bytes", "reserved")
    local left = tonumber(fields[7] or 0)
    if left ~= 0 and tonumber(fields[1] or 0) == 0 then
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
