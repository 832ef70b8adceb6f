-- Keeps drafts of texts that are being generated, for clients that read them meanwhile. A draft is
-- dropped where its lease is lost, or where there are too many. end_lease() deletes them with the
-- lease.
--
-- Touches job:<job> (drafted: bytes of the present attempt's drafts), draft:<job> (an entry
-- <attempt>-<drafted> per draft). Publishes done:<sub>.
--
-- ARGV: prefix, worker, time to live (ms), most bytes of an attempt, bytes that a draft counts for
--       beside its own, then per draft: job id, attempt, draft
--
-- Returns per draft: 1 kept, 0 not.
local worker, ttl, most, overhead = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local outcome = {}

for i = 6, #ARGV, 3 do
    local id, attempt, draft = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    local job = read_leased(id, worker, attempt)
    local bytes = #draft + overhead + (job and job.drafted or 0)
    local keep = job and bytes <= most
    if keep then
        local drafts = prefix.draft .. id
        -- By attempt and bytes, not by time: a reader's position holds for the next attempt.
        redis.call("XADD", drafts, attempt .. "-" .. bytes, "d", draft)
        redis.call("PEXPIRE", drafts, ttl)
        redis.call("HSET", job.key, "drafted", bytes)
        progressed[submission_id(id)] = true
    end
    outcome[#outcome + 1] = keep and 1 or 0
end
flush(0)
return outcome
