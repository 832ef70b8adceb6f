-- Frees submissions that ended long ago and whose results nobody acknowledged. Those that have not
-- ended are listed because their jobs wait until results are read: the caller ends their jobs.
--
-- Touches expiring (freed submissions removed), submission:<sub> (deleted), results:<sub>, job:<job>,
-- chunks:<job>:<attempt> (freed, the submission's last results last), backpressured:<sub> (deleted;
-- its jobs where the submission is gone), load, tenant:<tenant> (bytes of the results taken off).
--
-- ARGV: prefix, most results to free: bounds how long this holds Redis
--
-- Returns {1 where more may be due, else 0, {submission, number of jobs} of each that has not ended,
--          ...}
local left = tonumber(ARGV[2])
local reply = {0}
go_on_when_full()

local function free(id, tenant)
    -- First: from now on nobody reads what is left of the results.
    redis.call("DEL", prefix.submission .. id)
    for _, job_id in ipairs(redis.call("LRANGE", prefix.backpressured .. id, 0, -1)) do
        read_job(job_id)
    end
    redis.call("DEL", prefix.backpressured .. id)
    local results = prefix.results .. id
    local page = redis.call("XRANGE", results, "-", "+", "COUNT", left)
    local keys, bytes = {}, 0
    if page[1] and not tenant then
        local queue = redis.call("HGET", prefix.job .. page[1][2][2], "queue")
        tenant = queue and select(2, split(queue))
    end
    for _, entry in ipairs(page) do
        bytes = bytes + entry_keys(entry, keys)
    end
    call_many({"UNLINK"}, keys)
    if tenant then
        charge(tenant, 0, 0, -bytes)
    end
    if #page < left then
        redis.call("UNLINK", results)
        redis.call("ZREM", key.expiring, id)
    else
        local last = tonumber(string.match(page[#page][1], "^%d+"))
        redis.call("XTRIM", results, "MINID", "=", (last + 1) .. "-0")
    end
    left = left - #page - 1
end

local due = redis.call("ZRANGEBYSCORE", key.expiring, "-inf", now(), "LIMIT", 0, left)
for _, id in ipairs(due) do
    if left < 1 then
        break
    end
    local row = redis.call("HMGET", prefix.submission .. id, "tenant", "jobs", "ended")
    if row[1] and row[2] and row[3] and tonumber(row[3]) < tonumber(row[2]) then
        reply[#reply + 1] = {id, tonumber(row[2])}
    else
        free(id, row[1])
    end
end
reply[1] = left < 1 and 1 or 0
flush(0)
return reply
