-- Frees results that the client has, and queues jobs again that waited until results are read.
--
-- KEYS: results:<sub> (read entries deleted), submission:<sub> (stored; deleted with the last
-- result), backpressured:<sub> (jobs queued again). Also: expiring (the submission removed, or put
-- off while it has backpressured jobs), throttled_tenants (the tenant removed), job:<job> and
-- chunks:<job>:<attempt> (deleted), queues (read), queue:<...> (entries added), load, tenant:<tenant> (bytes taken
-- off), idempotency:<...> (expires sooner, with the last result). Publishes wake:<model>.
--
-- ARGV: prefix, through, bound on unread results of a submission (bytes), time that the idempotency
--       key is kept after the last result (ms), most results, result ttl (ms)
--
-- Returns how many results were freed.
local max_unread, key_ttl, ttl = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[6])
-- As many as can not exceed the bound by more than one lease's worth.
local MOST_REQUEUED = 64

local entries = redis.call("XRANGE", KEYS[1], "-", ARGV[2] .. "-0", "COUNT", ARGV[5])
if #entries == 0 then
    return 0
end
local through = tonumber(string.match(entries[#entries][1], "^%d+"))
local submission = submission_of(entries[1][2][2])
if submission.is_gone then
    -- expire.lua frees what is left.
    redis.call("ZADD", key.expiring, now(), submission.id)
    return 0
end
local keys, bytes = {}, 0
for _, entry in ipairs(entries) do
    bytes = bytes + entry_keys(entry, keys)
end
call_many({"UNLINK"}, keys)
charge(submission.tenant, 0, 0, -bytes)
if redis.call("ZREM", key.throttled_tenants, submission.tenant) == 1 then
    for _, name in ipairs(redis.call("SMEMBERS", key.queues)) do
        local _, tenant, model = split(name)
        if tenant == submission.tenant then
            woken_models[model] = true
        end
    end
end
if submission.ended == submission.jobs and through >= submission.ended then
    -- A client that has all results does not submit again, but a call may still be repeated.
    local idempotency = redis.call("HGET", KEYS[2], "key")
    if idempotency then
        redis.call("PEXPIRE", idempotency, key_ttl)
    end
    redis.call("DEL", KEYS[1], KEYS[2])
    redis.call("ZREM", key.expiring, submission.id)
else
    redis.call("XTRIM", KEYS[1], "MINID", "=", (through + 1) .. "-0")
    submission.stored = submission.stored - bytes
    submission.changed = true
    for _ = 1, submission.stored < max_unread and MOST_REQUEUED or 0 do
        local id = redis.call("LPOP", KEYS[3])
        if not id then
            break
        end
        local job = read_job(id)
        if job then
            requeue(job)
        end
    end
    if submission.ended < submission.jobs then
        if redis.call("EXISTS", KEYS[3]) == 1 then
            redis.call("ZADD", key.expiring, now() + ttl, submission.id)
        else
            redis.call("ZREM", key.expiring, submission.id)
        end
    end
end
flush(0)
return #entries
