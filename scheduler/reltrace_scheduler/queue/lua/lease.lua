-- Leases queued jobs to a worker. The attempt counts up: it is the fencing token of the lease.
--
-- Between priorities: where both wait, a tenth of the jobs is batch. Between tenants of a
-- priority: the one with the lowest virtual time is next, and its time goes on by the
-- bytes of its jobs over its weight (weighted fair queueing; start-time rule of
-- Goyal, Vin & Cheng, 1997). A tenant whose results nobody reads is passed over.
--
-- A job that was leased when its worker fell silent may be what killed it. Such jobs are
-- leased to a worker that holds nothing else: once in groups (class "suspect"), after the
-- second loss one by one ("alone"), so that none of them is condemned for another's deed.
-- They and all others take turns.
--
-- A call that is repeated, because its answer came too late, leases nothing: what the first one
-- leased nobody was told of, and comes back when the worker connects anew.
--
-- Between workers: while several serve the model, none is leased more than its share of what has
-- not ended; the rest is for those that ask next.
--
-- KEYS[1] worker:<id>                 hash    epoch read; call; mode "isolated" set or deleted
-- KEYS[2] held:<worker>               set     jobs added
-- KEYS[3] clock                       hash    virtual times; large queues read
-- KEYS[4] load                        hash    read
-- also: queue:<class>:<tenant>:<model> stream entries become pending for the worker
--       turns:<class>:<model>         zset    tenants' virtual times
--       turned:<class>:<model>        zset    those of tenants whose queue is empty
--       tenant:<tenant>               hash    read
--       job:<job>                     hash    state LEASED, attempt + 1, worker
--       submission:<sub>              hash    read
--       parked:<sub>                  list    jobs whose submission has too many unread results
--       expiring                      zset    a submission whose jobs are parked: nobody reads it
--       full                          zset    tenants that are passed over, since when
--
-- ARGV: prefix, group, worker, model, epoch, most jobs, most jobs of batch, bound on unread
--       results: of a submission, of a tenant, in all (bytes), workers of the model, number
--       of shards, of which each has an equal part of the last two bounds, jobs that the
--       worker holds from other shards, name of this call, result ttl (ms)
--
-- Returns {"superseded"}: another session has the worker's name; {"idle"}: nothing waits;
--         {"repeated"}: this call was made before;
--         {"suspects"}: jobs wait for a worker that holds nothing else; or
--         {"leased", {job id, attempt, spec, milliseconds queued, class, tenant}, ...}
local worker, model, epoch = ARGV[3], ARGV[4], ARGV[5]
local count, most_batch = tonumber(ARGV[6]), tonumber(ARGV[7])
local max_unread, max_tenant, max_all = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local workers, shards = tonumber(ARGV[11]), tonumber(ARGV[12])
local elsewhere, call = tonumber(ARGV[13]), ARGV[14]
max_all = max_all / shards

-- Suspects leased together, and how many other jobs come between two groups of them.
local GROUP, BETWEEN = 16, 64
-- Entries read at a time, and bytes after which a call ends: what a script hands over is bounded.
local AT_ONCE, MOST_BYTES = 16, 8388608
-- What a worker may hold in any case; and tenants that are counted.
local LEAST_SHARE, COUNTED = 2, 64

local row = redis.call("HMGET", KEYS[1], "epoch", "mode", "call")
if row[1] ~= epoch then
    return {"superseded"}
end
if row[3] == call then
    return {"repeated"}
end
local isolated = row[2] == "isolated"
local held = redis.call("SCARD", KEYS[2])
if isolated and held > 0 then
    return {"leased"}
end

local time = now()
local leased, ids, bytes = {"leased"}, {}, 0
local crowded = tonumber(redis.call("HGET", KEYS[4], "results") or 0) >= max_all

local tenants = {}
local function tenant_of(name)
    local tenant = tenants[name]
    if not tenant then
        local fields = redis.call("HMGET", prefix .. "tenant:" .. name,
            "weight", "results", "max_bytes")
        local results = tonumber(fields[2] or 0)
        tenant = {
            weight = tonumber(fields[1] or 1),
            -- Without results of its own it holds nothing that could be read.
            full = results >= tonumber(fields[3] or max_tenant) / shards or (crowded and results > 0),
        }
        if tenant.full then
            redis.call("ZADD", prefix .. "full", "NX", time, name)
        else
            redis.call("ZREM", prefix .. "full", name)
        end
        tenants[name] = tenant
    end
    return tenant
end

local function turns_of(class)
    return prefix .. "turns:" .. class .. ":" .. model
end

local function waits(class)
    for _, name in ipairs(redis.call("ZRANGE", turns_of(class), 0, -1)) do
        if not tenant_of(name).full then
            return true
        end
    end
    return false
end

-- Returns how many entries were read, how many jobs leased, and their bytes.
local function take(class, tenant, most)
    local name = class .. ":" .. tenant .. ":" .. model
    local queue = prefix .. "queue:" .. name
    local reply = redis.call("XREADGROUP", "GROUP", group, worker, "COUNT", most,
        "STREAMS", queue, ">")
    if not reply then
        return 0, 0, 0
    end
    local entries, taken, cost = reply[1][2], 0, 0
    for _, entry in ipairs(entries) do
        local id = entry[2][2]
        local key = prefix .. "job:" .. id
        local job = redis.call("HMGET", key, "attempt", "spec", "queued_at", "state", "entry")
        local waits = job[4] == "QUEUED" and job[5] == entry[1]
        local sub = waits and submission_of(id)
        if waits and sub.stored < max_unread then
            local attempt = job[1] + 1
            redis.call("HSET", key, "state", "LEASED", "worker", worker, "attempt", attempt)
            leased[#leased + 1] = {id, attempt, job[2], time - job[3], class, tenant}
            ids[#ids + 1] = id
            taken, cost = taken + 1, cost + #job[2]
        else
            -- To be parked; or of a job that is not there, or waits elsewhere.
            redis.call("XACK", queue, group, entry[1])
            redis.call("XDEL", queue, entry[1])
            if waits then
                redis.call("HDEL", key, "entry")
                redis.call("RPUSH", prefix .. "parked:" .. sub.id, id)
                redis.call("ZADD", prefix .. "expiring", "NX", time + tonumber(ARGV[15]), sub.id)
            end
        end
    end
    return #entries, taken, cost
end

-- Leases up to `want` jobs of a class.
local function serve(class, want)
    local turns, got, skip = turns_of(class), 0, 0
    while got < want and bytes < MOST_BYTES do
        local first = redis.call("ZRANGE", turns, skip, skip, "WITHSCORES")
        if not first[1] then
            break
        end
        local name, turn = first[1], tonumber(first[2])
        local tenant = tenant_of(name)
        if tenant.full then
            skip = skip + 1
        else
            local waiting = redis.call("ZCARD", turns) - skip
            local most = math.min(AT_ONCE, math.ceil((want - got) / waiting))
            if redis.call("HEXISTS", KEYS[3], "large:" .. class .. ":" .. name .. ":" .. model) == 1 then
                most = 1
            end
            local read, taken, cost = take(class, name, most)
            got, bytes = got + taken, bytes + cost
            redis.call("HSET", KEYS[3], class .. ":" .. model, string.format("%.17g", turn))
            local next_turn = string.format("%.17g", turn + cost / tenant.weight)
            if read < most then
                leave_turns(class, name, model, next_turn)
            else
                redis.call("ZADD", turns, next_turn, name)
            end
            redis.call("ZREMRANGEBYSCORE", prefix .. "turned:" .. class .. ":" .. model,
                "-inf", string.format("%.17g", turn))
        end
    end
    return got
end

-- Returns how many jobs more the worker may hold of those that wait here: streams hold what waits
-- and what is leased. What it holds of other models is none of their business.
local function share()
    local jobs, own = 0, 0
    for _, class in ipairs({"interactive", "batch"}) do
        for _, name in ipairs(redis.call("ZRANGE", turns_of(class), 0, COUNTED - 1)) do
            local queue = prefix .. "queue:" .. class .. ":" .. name .. ":" .. model
            local there = redis.call("XLEN", queue)
            jobs = jobs + there
            if there > 0 then
                for _, consumer in ipairs(redis.call("XPENDING", queue, group)[4] or {}) do
                    own = own + (consumer[1] == worker and tonumber(consumer[2]) or 0)
                end
            end
        end
    end
    return math.max(LEAST_SHARE, math.ceil(jobs / workers)) - own
end

local function lease_by_priority()
    if workers > 1 then
        count = math.min(count, share())
        if count <= 0 then
            return
        end
    end
    most_batch = math.min(most_batch, count)
    local share = 0
    if most_batch > 0 and waits("interactive") and waits("batch") then
        local before = redis.call("HINCRBY", KEYS[3], "both:" .. model, count) - count
        share = math.floor((before + count) / 10) - math.floor(before / 10)
    end
    local batch = serve("batch", math.min(share, most_batch))
    local interactive = serve("interactive", count - batch)
    serve("batch", math.min(most_batch, count - interactive) - batch)
end

local suspects = waits("alone") or waits("suspect")
if suspects and not (isolated and (waits("interactive") or waits("batch"))) then
    if held + elsewhere > 0 then
        return {"suspects"}
    end
    if serve("alone", 1) == 0 then
        serve("suspect", math.min(GROUP, count))
    end
    if #ids > 0 then
        redis.call("HSET", KEYS[1], "mode", "isolated")
    end
end
if #ids == 0 then
    if suspects then
        count = math.min(count, BETWEEN)
    end
    lease_by_priority()
    if isolated then
        redis.call("HDEL", KEYS[1], "mode")
    end
end
if #ids == 0 and redis.call("EXISTS", turns_of("interactive"), turns_of("batch"),
        turns_of("suspect"), turns_of("alone")) == 0 then
    return {"idle"}
end
if #ids > 0 then
    redis.call("HSET", KEYS[1], "call", call)
end
call_many({"SADD", KEYS[2]}, ids)
return leased
