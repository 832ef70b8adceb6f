-- Records that a scheduler looks for lost leases. After a gap (Redis did not answer, or no scheduler
-- was there) nobody could renew a lease: for one lease's time from now on, none is taken to be
-- lost (see reap.lua).
--
-- Touches watchdog (seen: this look; grace: until when no lease is lost).
--
-- ARGV: prefix, lease (ms)
go_on_when_full()
local time, lease = now(), tonumber(ARGV[2])
local seen = tonumber(redis.call("HGET", key.watchdog, "seen") or 0)
-- A scheduler looks every quarter of a lease, and a worker renews every third of one: where it could
-- not for half a lease, its leases may have run out.
if time - seen > lease / 2 then
    redis.call("HSET", key.watchdog, "grace", time + lease)
end
redis.call("HSET", key.watchdog, "seen", time)
