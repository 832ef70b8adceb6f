-- Frees submissions that ended long ago and whose results nobody acknowledged. Those that have not
-- ended are listed because their jobs wait until results are read: the caller ends their jobs.
--
-- Touches expiring (due submissions removed), submission:<sub>, results:<sub>, job:<job>,
-- chunks:<job>:<attempt> (deleted), load, tenant:<tenant> (bytes of the results taken off).
--
-- ARGV: prefix, most submissions
--
-- Returns {how many were freed, {submission, number of jobs} of each that has not ended, ...}.
local reply = {0}

local function free(id, submission, tenant, stored)
    local results = prefix.results .. id
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
    if tenant then
        charge(tenant, 0, 0, -tonumber(stored or 0))
    end
    redis.call("ZREM", key.expiring, id)
    reply[1] = reply[1] + 1
end

for _, id in ipairs(redis.call("ZRANGEBYSCORE", key.expiring, "-inf", now(), "LIMIT", 0, ARGV[2])) do
    local submission = prefix.submission .. id
    local row = redis.call("HMGET", submission, "tenant", "stored", "jobs", "ended")
    if row[1] and tonumber(row[4]) < tonumber(row[3]) then
        reply[#reply + 1] = {id, tonumber(row[3])}
    else
        free(id, submission, row[1], row[2])
    end
end
flush(0)
return reply
