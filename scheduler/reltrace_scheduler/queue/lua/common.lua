-- What the scripts share: this text stands before each of them.
--
-- Every script has ARGV[1] = prefix of the keys, ARGV[2] = name of the consumer group.
-- Changes that many jobs of one call make to the same key are summed up and written
-- once, by settle(): call it last.
local prefix, group = ARGV[1], ARGV[2]

local function now()
    local time = redis.call("TIME")
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Calls a command with arguments of any number: unpack() is bounded by Lua's stack.
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

local function append(lists, key, value)
    local list = lists[key]
    if not list then
        list = {}
        lists[key] = list
    end
    list[#list + 1] = value
end

-- submission:<sub>, read once; `ended` and `stored` are changed here and written by settle().
local submissions = {}

local function submission_of(id)
    local sub = string.match(id, "^(.+)%-%d+$")
    local held = submissions[sub]
    if not held then
        local row = redis.call("HMGET", prefix .. "submission:" .. sub,
            "tenant", "jobs", "ended", "stored")
        held = {
            id = sub, tenant = row[1], jobs = tonumber(row[2]),
            ended = tonumber(row[3]), stored = tonumber(row[4] or 0),
        }
        submissions[sub] = held
    end
    return held
end

-- load and tenant:<tenant>: what they hold.
local loads = {}

local function charge(tenant, jobs, bytes, results)
    local load = loads[tenant]
    if not load then
        load = {0, 0, 0}
        loads[tenant] = load
    end
    load[1], load[2], load[3] = load[1] + jobs, load[2] + bytes, load[3] + results
end

-- job:<job>; nil where there is none.
local function read_job(id)
    local key = prefix .. "job:" .. id
    local row = redis.call("HMGET", key, "state", "worker", "attempt", "queue", "entry",
        "bytes", "stored", "due", "drafted")
    if not row[1] then
        return nil
    end
    return {
        id = id, key = key, state = row[1], worker = row[2], attempt = row[3], queue = row[4],
        entry = row[5], bytes = tonumber(row[6]), stored = tonumber(row[7] or 0), due = row[8],
        drafted = row[9],
    }
end

-- queue:<name>: entries that go, leased or not; held:<worker>: jobs that it holds no more.
local gone, dropped = {}, {}

-- Every lease ends here, and what was drafted under it goes too: draft:<job>.
local function drop_lease(job)
    append(gone, job.queue, job.entry)
    append(dropped, job.worker, job.id)
    if job.drafted then
        redis.call("DEL", prefix .. "draft:" .. job.id)
        redis.call("HDEL", job.key, "drafted")
    end
end

-- chunks:<job>:<attempt> of an attempt that is void.
local function drop_chunks(job)
    if job.stored > 0 then
        redis.call("DEL", prefix .. "chunks:" .. job.id .. ":" .. job.attempt)
        redis.call("HDEL", job.key, "stored")
        local sub = submission_of(job.id)
        sub.stored = sub.stored - job.stored
        sub.changed = true
        charge(sub.tenant, 0, 0, -job.stored)
    end
end

-- Specifications of more bytes are leased one by one: what a script hands over is bounded.
local LARGE = 262144

-- Puts a job at the end of queue:<class>:<tenant>:<model> and its tenant among those that wait:
-- in at the turn that is being served, so that having been away is no merit, or at the one that
-- was next for it when its queue became empty (turned:<class>:<model>), so that it is no trick.
local opened, woken = {}, {}

local function enqueue(id, class, tenant, model, bytes)
    local name = class .. ":" .. tenant .. ":" .. model
    local queue = prefix .. "queue:" .. name
    if not opened[name] then
        opened[name] = true
        if redis.call("SADD", prefix .. "queues", name) == 1 then
            redis.call("XGROUP", "CREATE", queue, group, "0", "MKSTREAM")
        end
        local of_all = class .. ":" .. model
        if not redis.call("ZSCORE", prefix .. "turns:" .. of_all, tenant) then
            local turn = redis.call("HGET", prefix .. "clock", of_all) or "0"
            local own = redis.call("ZSCORE", prefix .. "turned:" .. of_all, tenant)
            if own and tonumber(own) > tonumber(turn) then
                turn = own
            end
            redis.call("ZADD", prefix .. "turns:" .. of_all, turn, tenant)
            redis.call("ZREM", prefix .. "turned:" .. of_all, tenant)
        end
        woken[model] = true
    end
    if bytes > LARGE then
        redis.call("HSET", prefix .. "clock", "large:" .. name, 1)
    end
    return name, redis.call("XADD", queue, "*", "j", id)
end

-- Takes a tenant whose queue is empty from those that wait. Its next turn is kept until the clock
-- is past it; when nobody waits any more all begin anew.
local function leave_turns(class, tenant, model, turn)
    local of_all = class .. ":" .. model
    local turns, turned = prefix .. "turns:" .. of_all, prefix .. "turned:" .. of_all
    redis.call("ZREM", turns, tenant)
    if turn then
        redis.call("ZADD", turned, turn, tenant)
    end
    if redis.call("EXISTS", turns) == 0 then
        local last = redis.call("ZREVRANGE", turned, 0, 0, "WITHSCORES")[2]
        if last and tonumber(last) > tonumber(redis.call("HGET", prefix .. "clock", of_all) or 0) then
            redis.call("HSET", prefix .. "clock", of_all, last)
        end
        redis.call("DEL", turned)
    end
end

local function split(queue)
    return string.match(queue, "^([^:]*):([^:]*):(.*)$")
end

-- Queues a job again that is in no queue at present.
local function requeue(job, class)
    local old, tenant, model = split(job.queue)
    local name, entry = enqueue(job.id, class or old, tenant, model, job.bytes)
    redis.call("HSET", job.key, "state", "QUEUED", "queue", name, "entry", entry)
    redis.call("HDEL", job.key, "worker")
end

-- Ends a job whose result is stored: the result becomes visible, whole, as the next
-- entry of results:<sub>. `list` names its chunks where they are not in `chunk` alone.
-- `entry_keys` names what an entry keeps alive, and gives the bytes of its result.
local states, done = {}, {}

local function entry_keys(entry, keys)
    local fields = entry[2]
    keys[#keys + 1] = prefix .. "job:" .. fields[2]
    if fields[3] == "l" then
        keys[#keys + 1] = fields[4]
        return tonumber(fields[6])
    end
    return #fields[4]
end

local function finish(job, state, chunk, list, bytes)
    local sub = submission_of(job.id)
    sub.ended = sub.ended + 1
    sub.changed = true
    local results = prefix .. "results:" .. sub.id
    if list then
        redis.call("XADD", results, sub.ended .. "-0", "j", job.id, "l", list, "b", bytes)
    else
        redis.call("XADD", results, sub.ended .. "-0", "j", job.id, "c", chunk)
        sub.stored = sub.stored + #chunk
        charge(sub.tenant, 0, 0, #chunk)
    end
    redis.call("HSET", job.key, "state", state)
    redis.call("HDEL", job.key, "spec")
    if job.due then
        redis.call("ZREM", prefix .. "deadlines", job.id)
    end
    charge(sub.tenant, -1, -job.bytes, 0)
    states[state] = (states[state] or 0) + 1
    done[sub.id] = true
end

-- The time to live starts when the whole submission has ended: a job that waits long
-- must not cost the results of its neighbours.
local function settle(ttl)
    for id, sub in pairs(submissions) do
        if sub.changed then
            redis.call("HSET", prefix .. "submission:" .. id,
                "ended", sub.ended, "stored", sub.stored)
            if done[id] and sub.ended == sub.jobs then
                redis.call("ZADD", prefix .. "expiring", now() + ttl, id)
            end
        end
    end
    for tenant, load in pairs(loads) do
        local key = prefix .. "tenant:" .. tenant
        for i, field in ipairs({"jobs", "bytes", "results"}) do
            if load[i] ~= 0 then
                redis.call("HINCRBY", key, field, load[i])
                redis.call("HINCRBY", prefix .. "load", field, load[i])
            end
        end
    end
    for state, count in pairs(states) do
        redis.call("HINCRBY", prefix .. "ended", state, count)
    end
    for queue, entries in pairs(gone) do
        call_many({"XACK", prefix .. "queue:" .. queue, group}, entries)
        call_many({"XDEL", prefix .. "queue:" .. queue}, entries)
    end
    for worker, ids in pairs(dropped) do
        call_many({"SREM", prefix .. "held:" .. worker}, ids)
    end
    for model in pairs(woken) do
        redis.call("PUBLISH", prefix .. "wake:" .. model, "")
    end
    for id in pairs(done) do
        redis.call("PUBLISH", prefix .. "done:" .. id, "")
    end
end
