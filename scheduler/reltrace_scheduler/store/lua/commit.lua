-- Stores chunks of results. A chunk is written only under the lease it was computed
-- under; the last chunk of a job ends the job and makes its result visible, whole.
--
-- KEYS[1] load                     hash    jobs and bytes taken off
-- KEYS[2] ended                    hash    counted by state
-- also: job:<job>                  hash    state
--       queue:<model>              stream  the job's entry is acknowledged and deleted
--       submission:<sub>           hash    ended + 1
--       results:<sub>              stream  an entry per ended job
--       chunks:<job>:<attempt>     list    chunks of results that are more than one
-- publishes done:<sub>
--
-- ARGV: prefix, group, worker, result ttl (ms), then per chunk:
--       submission, job id, attempt, chunk number, end state or "", chunk
--
-- Returns per chunk: 1 stored (now or before), 0 the lease is lost, -1 out of order.
local prefix, group, worker, ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local outcome, done = {}, {}

-- Small results travel inside the stream's entry; larger ones would make reading a
-- page of the stream unbounded in memory.
local INLINE = 65536

-- The time to live starts when the whole submission has ended: a job that waits long
-- must not cost the results of its neighbours.
local function expire(sub, submission, results)
    redis.call("PEXPIRE", submission, ttl)
    redis.call("PEXPIRE", results, ttl)
    local from = "-"
    while true do
        local page = redis.call("XRANGE", results, from, "+", "COUNT", 50)
        for _, entry in ipairs(page) do
            redis.call("PEXPIRE", prefix .. "job:" .. entry[2][2], ttl)
            if entry[2][3] == "l" then
                redis.call("PEXPIRE", entry[2][4], ttl)
            end
            from = "(" .. entry[1]
        end
        if #page < 50 then
            return
        end
    end
end

for i = 5, #ARGV, 6 do
    local sub, id, attempt = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    local number, state, chunk = tonumber(ARGV[i + 3]), ARGV[i + 4], ARGV[i + 5]
    local key = prefix .. "job:" .. id
    local job = redis.call("HMGET", key, "state", "worker", "attempt", "entry", "model", "bytes")
    local code
    if job[2] ~= worker or job[3] ~= attempt then
        code = 0
    elseif job[1] ~= "LEASED" then
        -- Sent again because the answer to the first sending was lost.
        code = (job[1] == "SUCCEEDED" or job[1] == "FAILED") and 1 or 0
    else
        local list = prefix .. "chunks:" .. id .. ":" .. attempt
        local stored = redis.call("LLEN", list)
        if number <= stored then
            code = 1
        elseif number > stored + 1 then
            code = -1
        else
            code = 1
            local inline = number == 1 and state ~= "" and #chunk <= INLINE
            if not inline then
                redis.call("RPUSH", list, chunk)
            end
            if state ~= "" then
                local queue = prefix .. "queue:" .. job[5]
                local results = prefix .. "results:" .. sub
                local submission = prefix .. "submission:" .. sub
                local entry = redis.call("HINCRBY", submission, "ended", 1)
                if inline then
                    redis.call("XADD", results, entry .. "-0", "j", id, "c", chunk)
                else
                    redis.call("XADD", results, entry .. "-0", "j", id, "l", list)
                end
                redis.call("HSET", key, "state", state)
                redis.call("HDEL", key, "spec")
                redis.call("XACK", queue, group, job[4])
                redis.call("XDEL", queue, job[4])
                redis.call("HINCRBY", KEYS[1], "jobs", -1)
                redis.call("HINCRBY", KEYS[1], "bytes", 0 - tonumber(job[6]))
                redis.call("HINCRBY", KEYS[2], state, 1)
                if entry == tonumber(redis.call("HGET", submission, "jobs")) then
                    expire(sub, submission, results)
                end
                done[sub] = true
            end
        end
    end
    outcome[#outcome + 1] = code
end
for sub in pairs(done) do
    redis.call("PUBLISH", prefix .. "done:" .. sub, "")
end
return outcome
