-- Leases queued jobs to a worker. The attempt counts up: it is the fencing token of the lease.
--
-- Between priorities: where both have jobs, a tenth of those leased is batch. Between tenants of a
-- priority: the one with the lowest virtual time is next, and its time goes on by the bytes of its
-- jobs over its weight (weighted fair queueing; start-time rule of Goyal, Vin & Cheng, 1997).
--
-- Room for results: a lease reserves as much as the job's result may take, but not more than half of
-- a bound. A tenant is skipped while
-- its unread results and what is reserved leave no room for another result of the size, within
-- its bound or that of all. A tenant that holds nothing gets one lease nevertheless, and one
-- without unread results, which could not make room by reading, may go beyond the bound of all
-- until RESERVE is used up too.
--
-- A job whose lease was lost may be what killed its worker. Such jobs are isolated:
-- leased to a worker that holds nothing else, first in groups (class isolate_group), after the
-- second loss one by one (isolate_single), so that no other job is quarantined because of them.
-- Between two groups of them a worker takes other jobs.
--
-- A call that is repeated, because its answer came too late, leases nothing: the worker was not
-- told of what the first one leased, and releases it when it connects again.
--
-- Between workers: while several serve the model, none is leased more than its share of the jobs
-- that have not ended; the rest is for those that ask next.
--
-- KEYS: worker:<id> (epoch read; call; mode "isolated" set or deleted), held:<worker> (jobs added).
-- Also: queue:<...> (entries become pending for the worker), vt_active:<class>:<model>,
-- vt_idle:<class>:<model> and virtual_time, load and tenant:<tenant> (reserved), submission:<sub> (read),
-- job:<job> (state LEASED, attempt + 1, worker, reserved), backpressured:<sub> (jobs whose submission has too
-- many unread results), expiring (such submissions), throttled_tenants (tenants that are skipped).
--
-- ARGV: prefix, worker, model, epoch, most jobs, most jobs of batch; bounds on unread results
--       (bytes): of a submission, of a tenant, in all; workers of the model, number of shards, of
--       which each has an equal part of the last two bounds, jobs that the worker holds in other
--       shards, name of this call, result ttl (ms)
--
-- Returns {"superseded"}: another session has the worker's name; {"repeated"}: this call was made
--         before; {"empty"}: no job is queued; {"isolated"}: isolated jobs are queued, and the
--         worker holds others; or {"leased", {job id, attempt, spec, milliseconds queued, queue},
--         ...}
local worker, model, epoch = ARGV[2], ARGV[3], ARGV[4]
local count, most_batch = tonumber(ARGV[5]), tonumber(ARGV[6])
local max_unread, max_tenant, max_all = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local workers, shards = tonumber(ARGV[10]), tonumber(ARGV[11])
local held_elsewhere, call, ttl = tonumber(ARGV[12]), ARGV[13], tonumber(ARGV[14])

-- Isolated jobs that are leased together, and jobs that a worker takes between two groups.
local GROUP_SIZE, BETWEEN = 16, 64
-- Entries read at a time, and bytes after which a call ends: what a script returns is bounded.
local PAGE, MOST_BYTES = 16, 8388608
-- What a worker may hold in any case; tenants that are counted for its share.
local LEAST_SHARE, COUNTED = 2, 64
-- Part of the bound of all that only tenants without unread results may use beyond it.
local RESERVE = 0.25

go_on_when_full()
local session = redis.call("HMGET", KEYS[1], "epoch", "mode", "call")
if session[1] ~= epoch then
    return {"superseded"}
end
if session[3] == call then
    return {"repeated"}
end
local isolated = session[2] == "isolated"
local held = redis.call("SCARD", KEYS[2])
if isolated and held > 0 then
    return {"leased"}
end

local time = now()
local leased, leased_ids, bytes = {"leased"}, {}, 0
local load = redis.call("HMGET", key.load, "results", "reserved")
local taken_in_all = tonumber(load[1] or 0) + tonumber(load[2] or 0)
max_all = max_all / shards

local tenants = {}
local function tenant_of(name)
    local tenant = tenants[name]
    if not tenant then
        local fields = redis.call("HMGET", prefix.tenant .. name,
            "weight", "results", "max_bytes", "reserved")
        tenant = {
            weight = tonumber(fields[1] or 1),
            results = tonumber(fields[2] or 0),
            bound = tonumber(fields[3] or max_tenant) / shards,
            taken = tonumber(fields[2] or 0) + tonumber(fields[4] or 0),
        }
        -- So that a little that is unread does not keep out what may be large, and seldom is.
        tenant.most_reserved = math.floor(math.min(tenant.bound, max_all) / 2)
        tenants[name] = tenant
    end
    return tenant
end

-- Returns for how many jobs of one queue there is room: whatever their results turn out to be.
local function room_for(class, name)
    local tenant = tenant_of(name)
    local largest = tonumber(redis.call("HGET", key.virtual_time,
        "result:" .. class .. ":" .. name .. ":" .. model) or 0)
    largest = math.min(largest, tenant.most_reserved)
    local most_in_all = tenant.results > 0 and max_all or max_all * (1 + RESERVE)
    local room = math.min(tenant.bound - tenant.taken, most_in_all - taken_in_all)
    local jobs = room > 0 and math.floor(room / math.max(1, largest)) or 0
    if jobs < 1 and tenant.taken == 0
            and (taken_in_all == 0 or taken_in_all + largest <= most_in_all) then
        jobs = 1
    end
    if jobs < 1 and tenant.results > 0 then
        redis.call("ZADD", key.throttled_tenants, "NX", time, name)
    elseif jobs > 0 then
        redis.call("ZREM", key.throttled_tenants, name)
    end
    return jobs
end

local function active_key(class)
    return prefix.vt_active .. class .. ":" .. model
end

local function has_jobs(class)
    for _, name in ipairs(redis.call("ZRANGE", active_key(class), 0, -1)) do
        if room_for(class, name) > 0 then
            return true
        end
    end
    return false
end

-- Leases up to `most` jobs of one queue. Returns how many entries were read, how many jobs were
-- leased, and their bytes.
local function lease_from(class, tenant, most)
    local name = class .. ":" .. tenant .. ":" .. model
    local queue = prefix.queue .. name
    local reply = redis.call("XREADGROUP", "GROUP", GROUP, worker, "COUNT", most,
        "STREAMS", queue, ">")
    if not reply then
        return 0, 0, 0
    end
    local entries, taken, cost, reserved = reply[1][2], 0, 0, 0
    for _, entry in ipairs(entries) do
        local id = entry[2][2]
        local job_key = prefix.job .. id
        local job = redis.call("HMGET", job_key,
            "attempt", "spec", "queued_at", "state", "entry", "result")
        local queued = job[4] == "QUEUED" and job[5] == entry[1]
        local submission = queued and submission_of(id)
        if queued and submission.is_gone then
            read_job(id)
        elseif queued and submission.stored < max_unread then
            local attempt = job[1] + 1
            local result = math.min(tonumber(job[6] or 0), tenant_of(tenant).most_reserved)
            redis.call("HSET", job_key,
                "state", "LEASED", "worker", worker, "attempt", attempt, "reserved", result)
            reserved = reserved + result
            leased[#leased + 1] = {id, attempt, job[2], time - job[3], name}
            leased_ids[#leased_ids + 1] = id
            taken, cost = taken + 1, cost + #job[2]
        else
            -- Backpressured; or of a job that is gone, or is queued by another entry.
            redis.call("XACK", queue, GROUP, entry[1])
            redis.call("XDEL", queue, entry[1])
            if not job[4] then
                -- Its record was lost. Nobody can end it: its submission is unknown from now on, so
                -- that whoever waits for it is told, and may submit it again.
                redis.call("DEL", prefix.submission .. submission_id(id))
                redis.call("ZADD", key.expiring, time, submission_id(id))
                charge(tenant, -1, 0, 0)
            elseif queued then
                redis.call("HDEL", job_key, "entry")
                redis.call("RPUSH", prefix.backpressured .. submission.id, id)
                redis.call("ZADD", key.expiring, "NX", time + ttl, submission.id)
            end
        end
    end
    if reserved > 0 then
        local of_tenant = tenant_of(tenant)
        of_tenant.taken, taken_in_all = of_tenant.taken + reserved, taken_in_all + reserved
        charge(tenant, 0, 0, 0, reserved)
    end
    return #entries, taken, cost
end

-- Leases up to `want` jobs of a class; returns how many.
local function lease_class(class, want)
    local class_model, active = class .. ":" .. model, active_key(class)
    local got, skipped = 0, 0
    while got < want and bytes < MOST_BYTES do
        local first = redis.call("ZRANGE", active, skipped, skipped, "WITHSCORES")
        if not first[1] then
            break
        end
        local name, start = first[1], tonumber(first[2])
        local tenant, room = tenant_of(name), room_for(class, name)
        if room < 1 then
            skipped = skipped + 1
        else
            local waiting = redis.call("ZCARD", active) - skipped
            local most = math.min(PAGE, room, math.ceil((want - got) / waiting))
            local large = "large:" .. class .. ":" .. name .. ":" .. model
            if redis.call("HEXISTS", key.virtual_time, large) == 1 then
                most = 1
            end
            local read, taken, cost = lease_from(class, name, most)
            got, bytes = got + taken, bytes + cost
            local virtual_time = string.format("%.17g", start)
            redis.call("HSET", key.virtual_time, class_model, virtual_time)
            local next_time = string.format("%.17g", start + cost / tenant.weight)
            if read < most then
                deactivate(class, name, model, next_time)
            else
                redis.call("ZADD", active, next_time, name)
            end
            redis.call("ZREMRANGEBYSCORE", prefix.vt_idle .. class_model, "-inf", virtual_time)
        end
    end
    return got
end

-- Returns how many more jobs of this model the worker may hold: streams hold what is queued and
-- what is leased. What it holds of other models does not count.
local function share()
    local jobs, mine = 0, 0
    for _, class in ipairs({"interactive", "batch"}) do
        for _, name in ipairs(redis.call("ZRANGE", active_key(class), 0, COUNTED - 1)) do
            local queue = prefix.queue .. class .. ":" .. name .. ":" .. model
            local length = redis.call("XLEN", queue)
            jobs = jobs + length
            if length > 0 then
                for _, consumer in ipairs(redis.call("XPENDING", queue, GROUP)[4] or {}) do
                    mine = mine + (consumer[1] == worker and tonumber(consumer[2]) or 0)
                end
            end
        end
    end
    return math.max(LEAST_SHARE, math.ceil(jobs / workers)) - mine
end

local function lease_by_priority()
    if workers > 1 then
        count = math.min(count, share())
        if count <= 0 then
            return
        end
    end
    most_batch = math.min(most_batch, count)
    local batch_share = 0
    if most_batch > 0 and has_jobs("interactive") and has_jobs("batch") then
        local before = redis.call("HINCRBY", key.virtual_time, "both:" .. model, count) - count
        batch_share = math.floor((before + count) / 10) - math.floor(before / 10)
    end
    local batch = lease_class("batch", math.min(batch_share, most_batch))
    local interactive = lease_class("interactive", count - batch)
    lease_class("batch", math.min(most_batch, count - interactive) - batch)
end

local isolate = has_jobs("isolate_single") or has_jobs("isolate_group")
if isolate and not (isolated and (has_jobs("interactive") or has_jobs("batch"))) then
    if held + held_elsewhere > 0 then
        return {"isolated"}
    end
    if lease_class("isolate_single", 1) == 0 then
        lease_class("isolate_group", math.min(GROUP_SIZE, count))
    end
    if #leased_ids > 0 then
        redis.call("HSET", KEYS[1], "mode", "isolated")
    end
end
if #leased_ids == 0 then
    if isolate then
        count = math.min(count, BETWEEN)
    end
    lease_by_priority()
    if isolated then
        redis.call("HDEL", KEYS[1], "mode")
    end
end
flush(0)
if #leased_ids == 0 and redis.call("EXISTS", active_key("interactive"), active_key("batch"),
        active_key("isolate_group"), active_key("isolate_single")) == 0 then
    return {"empty"}
end
if #leased_ids > 0 then
    redis.call("HSET", KEYS[1], "call", call)
end
call_many({"SADD", KEYS[2]}, leased_ids)
return leased
