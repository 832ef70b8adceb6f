-- What the scripts share. It stands before each of them, and after the names that shards.py makes
-- from keys.py: key.<shared key>, prefix.<entity> .. id, GROUP and REAPER.
--
-- A full Redis refuses a script's first write if it may take memory, and no write after that. Scripts
-- that move or free what is there begin with go_on_when_full(); those that bring something
-- (submit.lua, commit.lua, draft.lua) are refused before they have written anything.
--
-- Changes that many jobs of one call make to the same key are summed up, and written once by
-- flush(): call it last. The functions below touch, beside what their comments name:
--   submission:<sub>, load, tenant:<tenant>, ended, expiring, queue:<...>, held:<worker>

local function now()
    local time = redis.call("TIME")
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function go_on_when_full()
    redis.call("DEL", key.nothing)
end

-- Calls a command with any number of arguments: unpack() is bounded by Lua's stack.
local function call_many(head, arguments, tail)
    for i = 1, #arguments, 500 do
        local call = {unpack(head)}
        for k = i, math.min(i + 499, #arguments) do
            call[#call + 1] = arguments[k]
        end
        if tail then
            call[#call + 1] = tail
        end
        redis.call(unpack(call))
    end
end

local function append(lists, name, value)
    local list = lists[name]
    if not list then
        list = {}
        lists[name] = list
    end
    list[#list + 1] = value
end

local function submission_id(job_id)
    return string.match(job_id, "^(.+)%-%d+$")
end

-- submission:<sub>, read once; `ended` and `stored` are changed here and written by flush(). Where it
-- is gone, or a part of it, `is_gone` is true.
local submissions = {}

local function submission_of(job_id)
    local id = submission_id(job_id)
    local submission = submissions[id]
    if not submission then
        local row = redis.call("HMGET", prefix.submission .. id, "tenant", "jobs", "ended", "stored")
        submission = {
            id = id, tenant = row[1], jobs = tonumber(row[2]),
            ended = tonumber(row[3]), stored = tonumber(row[4] or 0),
            is_gone = not (row[1] and row[2] and row[3]),
        }
        submissions[id] = submission
    end
    return submission
end

-- Adds to what load and tenant:<tenant> hold.
local loads = {}

local function charge(tenant, jobs, bytes, results, reserved)
    local load = loads[tenant]
    if not load then
        load = {0, 0, 0, 0}
        loads[tenant] = load
    end
    load[1], load[2], load[3] = load[1] + jobs, load[2] + bytes, load[3] + results
    load[4] = load[4] + (reserved or 0)
end

-- Entries to delete by queue, and jobs that are not leased any more by worker.
local removed_entries, released_jobs = {}, {}

local function split(queue)
    return string.match(queue, "^([^:]*):([^:]*):(.*)$")
end

-- Removes a job whose submission is gone, with its lease, its place in a queue and its deadline: it
-- can not end. Its results that are stored expire at once.
local function drop(job)
    redis.call("ZREM", key.deadlines, job.id)
    redis.call("ZREM", key.delayed, job.id)
    if job.state == "QUEUED" or job.state == "LEASED" then
        local _, tenant = split(job.queue)
        if job.entry then
            append(removed_entries, job.queue, job.entry)
        end
        if job.worker then
            append(released_jobs, job.worker, job.id)
        end
        charge(tenant, -1, -job.bytes, -job.stored, -job.reserved)
        redis.call("UNLINK", job.key, prefix.draft .. job.id,
            prefix.chunks .. job.id .. ":" .. job.attempt)
    end
    redis.call("ZADD", key.expiring, now(), submission_id(job.id))
end

-- Reads job:<job>; nil where there is none, or its submission is gone.
local function read_job(id)
    local name = prefix.job .. id
    local row = redis.call("HMGET", name, "state", "worker", "attempt", "queue", "entry",
        "bytes", "stored", "due", "drafted", "result", "reserved")
    if not row[1] then
        return nil
    end
    local job = {
        id = id, key = name, state = row[1], worker = row[2], attempt = row[3], queue = row[4],
        entry = row[5], bytes = tonumber(row[6]), stored = tonumber(row[7] or 0), due = row[8],
        drafted = row[9], result = tonumber(row[10] or 0), reserved = tonumber(row[11] or 0),
    }
    if submission_of(id).is_gone then
        drop(job)
        return nil
    end
    return job
end

-- Reads job:<job>; nil where it is not leased to this worker under this attempt.
local function read_leased(id, worker, attempt)
    local job = read_job(id)
    if job and job.state == "LEASED" and job.worker == worker and job.attempt == attempt then
        return job
    end
end

-- Ends a lease, gives up the room that it reserved for its result, and deletes what was drafted
-- under it: draft:<job>.
local function end_lease(job)
    append(removed_entries, job.queue, job.entry)
    append(released_jobs, job.worker, job.id)
    if job.reserved > 0 then
        charge(submission_of(job.id).tenant, 0, 0, 0, -job.reserved)
        if not job.is_over then
            redis.call("HDEL", job.key, "reserved")
        end
    end
    if job.drafted then
        redis.call("DEL", prefix.draft .. job.id)
        redis.call("HDEL", job.key, "drafted")
    end
end

-- Deletes chunks:<job>:<attempt> of an attempt that is void.
local function discard_chunks(job)
    if job.stored > 0 then
        redis.call("UNLINK", prefix.chunks .. job.id .. ":" .. job.attempt)
        redis.call("HDEL", job.key, "stored")
        local submission = submission_of(job.id)
        submission.stored = submission.stored - job.stored
        submission.changed = true
        charge(submission.tenant, 0, 0, -job.stored)
    end
end

-- Specifications of more bytes are leased one by one: what a script returns is bounded.
local LARGE = 262144

-- Appends a job to its queue and notes its tenant in vt_active:<class>:<model>. The tenant begins
-- at the present virtual time, so that it gains nothing by having been idle, or at its own of
-- vt_idle:<class>:<model> where that is later, so that it gains nothing by a queue that is often
-- empty.
local opened_queues, woken_models, largest_results = {}, {}, {}

local function enqueue(id, class, tenant, model, bytes, result)
    local name = class .. ":" .. tenant .. ":" .. model
    local queue = prefix.queue .. name
    if not opened_queues[name] then
        opened_queues[name] = true
        if redis.call("SADD", key.queues, name) == 1 or redis.call("EXISTS", queue) == 0 then
            -- The group is there where only the name was gone.
            redis.pcall("XGROUP", "CREATE", queue, GROUP, "0", "MKSTREAM")
        end
        local class_model = class .. ":" .. model
        local active, idle = prefix.vt_active .. class_model, prefix.vt_idle .. class_model
        if not redis.call("ZSCORE", active, tenant) then
            local time = redis.call("HGET", key.virtual_time, class_model) or "0"
            local idle_time = redis.call("ZSCORE", idle, tenant)
            if idle_time and tonumber(idle_time) > tonumber(time) then
                time = idle_time
            end
            redis.call("ZADD", active, time, tenant)
            redis.call("ZREM", idle, tenant)
        end
        woken_models[model] = true
    end
    if bytes > LARGE then
        redis.call("HSET", key.virtual_time, "large:" .. name, 1)
    end
    local field = "result:" .. name
    if result > (largest_results[field] or 0) then
        largest_results[field] = result
        if result > tonumber(redis.call("HGET", key.virtual_time, field) or 0) then
            redis.call("HSET", key.virtual_time, field, result)
        end
    end
    return name, redis.call("XADD", queue, "*", "j", id)
end

-- Moves a tenant whose queue is empty to those that are idle, until the virtual time has passed
-- its own. When no tenant is active any more, all begin anew at the latest of these times.
local function deactivate(class, tenant, model, time)
    local class_model = class .. ":" .. model
    local active, idle = prefix.vt_active .. class_model, prefix.vt_idle .. class_model
    redis.call("ZREM", active, tenant)
    if time then
        redis.call("ZADD", idle, time, tenant)
    end
    if redis.call("EXISTS", active) == 0 then
        local last = redis.call("ZREVRANGE", idle, 0, 0, "WITHSCORES")[2]
        local present = redis.call("HGET", key.virtual_time, class_model) or 0
        if last and tonumber(last) > tonumber(present) then
            redis.call("HSET", key.virtual_time, class_model, last)
        end
        redis.call("DEL", idle)
    end
end

-- Queues a job again that is in no queue at present.
local function requeue(job, class)
    local old_class, tenant, model = split(job.queue)
    local name, entry = enqueue(job.id, class or old_class, tenant, model, job.bytes, job.result)
    redis.call("HSET", job.key, "state", "QUEUED", "queue", name, "entry", entry)
    redis.call("HDEL", job.key, "worker")
    if class then
        redis.call("HSETNX", job.key, "priority", old_class)
    end
end

-- Gives up a lease whose attempt is void, and queues the job again.
local function release(job, class)
    end_lease(job)
    discard_chunks(job)
    requeue(job, class)
end

-- Ended jobs by state, and the submissions whose readers flush() wakes.
local ended_states, progressed = {}, {}

-- Collects the keys that an entry of results:<sub> keeps alive; returns the bytes of its result.
local function entry_keys(entry, keys)
    local fields = entry[2]
    keys[#keys + 1] = prefix.job .. fields[2]
    if fields[3] == "l" then
        keys[#keys + 1] = fields[4]
        return tonumber(fields[6])
    end
    return #fields[4]
end

-- Ends a job: its result becomes visible as a whole, as the next entry of results:<sub>. `list`
-- names its chunks where they are not in `chunk` alone. Removes the job from deadlines.
local function finish(job, state, chunk, list, bytes)
    local submission = submission_of(job.id)
    submission.ended = submission.ended + 1
    submission.changed = true
    local results, entry = prefix.results .. submission.id, submission.ended .. "-0"
    if list then
        redis.call("XADD", results, entry, "j", job.id, "l", list, "b", bytes,
            "w", job.worker)
    else
        redis.call("XADD", results, entry, "j", job.id, "c", chunk)
        submission.stored = submission.stored + #chunk
        charge(submission.tenant, 0, 0, #chunk)
    end
    redis.call("HSET", job.key, "state", state)
    redis.call("HDEL", job.key, "spec", "reserved")
    job.is_over = true
    if job.due then
        redis.call("ZREM", key.deadlines, job.id)
    end
    charge(submission.tenant, -1, -job.bytes, 0)
    ended_states[state] = (ended_states[state] or 0) + 1
    progressed[submission.id] = true
end

-- Writes what was summed up, and publishes wake:<model> and done:<sub>. `ttl` (ms) is of results:
-- it starts when the whole submission has ended, so that a job that waits for long does not cost
-- the results of the others.
local function flush(ttl)
    for id, submission in pairs(submissions) do
        if submission.changed then
            redis.call("HSET", prefix.submission .. id,
                "ended", submission.ended, "stored", submission.stored)
            if progressed[id] and submission.ended == submission.jobs then
                redis.call("ZADD", key.expiring, now() + ttl, id)
            end
        end
    end
    for tenant, load in pairs(loads) do
        for i, field in ipairs({"jobs", "bytes", "results", "reserved"}) do
            if load[i] ~= 0 then
                redis.call("HINCRBY", prefix.tenant .. tenant, field, load[i])
                redis.call("HINCRBY", key.load, field, load[i])
            end
        end
    end
    for state, count in pairs(ended_states) do
        redis.call("HINCRBY", key.ended, state, count)
    end
    for queue, entries in pairs(removed_entries) do
        call_many({"XACK", prefix.queue .. queue, GROUP}, entries)
        call_many({"XDEL", prefix.queue .. queue}, entries)
    end
    for worker, ids in pairs(released_jobs) do
        call_many({"SREM", prefix.held .. worker}, ids)
    end
    for model in pairs(woken_models) do
        redis.call("PUBLISH", prefix.wake .. model, "")
    end
    for id in pairs(progressed) do
        redis.call("PUBLISH", prefix.done .. id, "")
    end
end

