-- Notes that somebody looks after the leases. After a gap in these looks (Redis did not
-- answer, or no scheduler was there) nobody could renew a lease: for one lease's time
-- from now on, none is taken to be lost (see reap.lua).
--
-- KEYS[1] watch   hash   seen: the last look; grace: until when no lease is lost
--
-- ARGV: prefix, group, lease (ms)
local time, lease = now(), tonumber(ARGV[3])
local seen = tonumber(redis.call("HGET", KEYS[1], "seen") or 0)
-- Looks come every quarter of a lease, and a worker renews every third: one that could
-- not for half a lease may hold leases that have run out.
if time - seen > lease / 2 then
    redis.call("HSET", KEYS[1], "grace", time + lease)
end
redis.call("HSET", KEYS[1], "seen", time)
