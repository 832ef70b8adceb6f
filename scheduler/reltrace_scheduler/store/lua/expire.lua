-- Frees submissions that ended long ago and whose results nobody acknowledged.
--
-- KEYS[1] expiring                  zset    due submissions removed
-- also: submission:<sub>            hash    deleted
--       results:<sub>               stream  deleted
--       job:<job>                   hash    deleted
--       chunks:<job>:<attempt>      list    deleted
--       load, tenant:<tenant>       hash    bytes of the results taken off
--
-- ARGV: prefix, group, most submissions
--
-- Returns how many there were.
local ids = redis.call("ZRANGEBYSCORE", KEYS[1], "-inf", now(), "LIMIT", 0, ARGV[3])
for _, id in ipairs(ids) do
    local submission, results = prefix .. "submission:" .. id, prefix .. "results:" .. id
    local row = redis.call("HMGET", submission, "tenant", "stored")
    local keys, from = {submission, results}, "-"
    while true do
        local page = redis.call("XRANGE", results, from, "+", "COUNT", 50)
        for _, entry in ipairs(page) do
            entry_keys(entry, keys)
            from = "(" .. entry[1]
        end
        if #page < 50 then
            break
        end
    end
    call_many({"DEL"}, keys)
    if row[1] then
        charge(row[1], 0, 0, -tonumber(row[2] or 0))
    end
    redis.call("ZREM", KEYS[1], id)
end
settle(0)
return #ids
