-- Stores chunks of results. A chunk is written only under the lease it was computed under; the
-- last chunk of a job ends the job and makes its result visible as a whole.
--
-- Touches job:<job> (state), queue:<...> (entry deleted), held:<worker> (job removed),
-- submission:<sub> (ended, stored), results:<sub> (an entry per ended job), chunks:<job>:<attempt>
-- (chunks of results that are more than one), draft:<job> (deleted), expiring (a submission that
-- ended), deadlines (job removed), load, tenant:<tenant>, ended. Publishes done:<sub>.
--
-- ARGV: prefix, worker, result ttl (ms), most bytes of a result, the same of a tenant that has no
--       bound of its own, then per chunk: job id, attempt, chunk number, end state or "", chunk,
--       the only chunk of a job whose result is too large
--
-- Returns per chunk: 1 stored (now or before), 0 the lease is lost, -1 out of order, 2 the result is
--         too large: the job has failed.
local worker, ttl, max_result, max_tenant = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local outcome = {}

-- Small results are in the stream's entry; with larger ones, reading a page of the stream would
-- take memory without a bound.
local INLINE = 65536

-- Adds a chunk to the list of a result; returns the list's key, or nil and why not.
local function add_to_list(job, number, chunk)
    local list = prefix.chunks .. job.id .. ":" .. job.attempt
    local stored = redis.call("LLEN", list)
    if number > stored + 1 then
        return nil, -1
    end
    if number == stored + 1 then
        local own = redis.call("HGET", prefix.tenant .. submission_of(job.id).tenant, "max_bytes")
        if job.stored + #chunk > math.min(max_result, tonumber(own or max_tenant)) then
            return nil, 2
        end
        redis.call("RPUSH", list, chunk)
        job.stored = redis.call("HINCRBY", job.key, "stored", #chunk)
        local submission = submission_of(job.id)
        submission.stored = submission.stored + #chunk
        submission.changed = true
        charge(submission.tenant, 0, 0, #chunk)
    end
    return list
end

for i = 6, #ARGV, 6 do
    local number, state, chunk = tonumber(ARGV[i + 2]), ARGV[i + 3], ARGV[i + 4]
    local job = read_job(ARGV[i])
    local code = 1
    if not job or job.worker ~= worker or job.attempt ~= ARGV[i + 1] then
        code = 0
    elseif job.state ~= "LEASED" then
        -- Sent again because the answer to the first sending was lost. But what follows a result
        -- that was too large did not end its job.
        local ended = job.state == "SUCCEEDED" or job.state == "FAILED"
        code = ended and (state == "" or state == job.state) and 1 or 0
    else
        local list, fault
        local inline = number == 1 and state ~= "" and #chunk <= INLINE
        if not inline then
            list, fault = add_to_list(job, number, chunk)
        end
        code = fault or 1
        if fault == 2 then
            discard_chunks(job)
            finish(job, "FAILED", ARGV[i + 5])
            end_lease(job)
        elseif not fault and state ~= "" then
            finish(job, state, chunk, list, job.stored)
            end_lease(job)
        end
    end
    outcome[#outcome + 1] = code
end
flush(ttl)
return outcome
