-- Frees submissions that ended long ago and whose results nobody acknowledged. Those that have not
-- ended are there because their jobs wait for a reader, who does not come: the caller ends them.
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
-- Returns {how many were freed, {submission, number of jobs} of each that has not ended, ...}.
local ids = redis.call("ZRANGEBYSCORE", KEYS[1], "-inf", now(), "LIMIT", 0, ARGV[3])
local reply = {0}

local function free(id, submission, row)
    local results = prefix .. "results:" .. id
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
    reply[1] = reply[1] + 1
end

for _, id in ipairs(ids) do
    local submission = prefix .. "submission:" .. id
    local row = redis.call("HMGET", submission, "tenant", "stored", "jobs", "ended")
    if row[1] and tonumber(row[4]) < tonumber(row[3]) then
        reply[#reply + 1] = {id, tonumber(row[3])}
    else
        free(id, submission, row)
    end
end
settle(0)
return reply
