-- Frees results that the client has, and lets jobs go on that waited for it to read.
--
-- KEYS[1] results:<sub>                   stream  entries up to `through` deleted
-- KEYS[2] submission:<sub>                hash    stored; deleted with the last result
-- KEYS[3] parked:<sub>                    list    jobs are queued again
-- KEYS[4] expiring                        zset    the submission removed with the last result, or
--                                                 put off while jobs of it are parked
-- also: job:<job>                         hash    deleted
--       chunks:<job>:<attempt>            list    deleted
--       queue:<class>:<tenant>:<model>    stream  an entry per job that goes on
--       load, tenant:<tenant>             hash    bytes of the results taken off
--       idempotency:<tenant>:<key>        string  expires sooner, with the last result
--       full                              zset    the tenant removed: somebody reads
-- publishes wake:<model>
--
-- ARGV: prefix, group, through, bound on unread results of a submission (bytes), time that
--       the idempotency key is kept after the last result (ms), most results, result ttl (ms)
--
-- Returns how many results were freed.
local max_unread = tonumber(ARGV[4])
local entries = redis.call("XRANGE", KEYS[1], "-", ARGV[3] .. "-0", "COUNT", ARGV[6])
if #entries == 0 then
    return 0
end
local through = tonumber(string.match(entries[#entries][1], "^%d+"))
local sub = submission_of(entries[1][2][2])
local keys, bytes = {}, 0
for _, entry in ipairs(entries) do
    bytes = bytes + entry_keys(entry, keys)
end
call_many({"DEL"}, keys)
charge(sub.tenant, 0, 0, -bytes)
redis.call("ZREM", prefix .. "full", sub.tenant)
if sub.ended == sub.jobs and through >= sub.ended then
    -- Who has read all of it does not send it again, but for a call that is still repeated.
    local key = redis.call("HGET", KEYS[2], "key")
    if key then
        redis.call("PEXPIRE", key, ARGV[5])
    end
    redis.call("DEL", KEYS[1], KEYS[2])
    redis.call("ZREM", KEYS[4], sub.id)
else
    redis.call("XTRIM", KEYS[1], "MINID", "=", (through + 1) .. "-0")
    sub.stored = sub.stored - bytes
    sub.changed = true
    -- As many as can not run over the bound by more than one lease's worth.
    for _ = 1, sub.stored < max_unread and 64 or 0 do
        local id = redis.call("LPOP", KEYS[3])
        if not id then
            break
        end
        requeue(read_job(id))
    end
    if sub.ended < sub.jobs then
        if redis.call("EXISTS", KEYS[3]) == 1 then
            redis.call("ZADD", KEYS[4], now() + tonumber(ARGV[7]), sub.id)
        else
            redis.call("ZREM", KEYS[4], sub.id)
        end
    end
end
settle(0)
return #entries
