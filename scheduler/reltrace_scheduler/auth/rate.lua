-- A token bucket (GCRA).
-- KEYS[1]  string: Unix time at which the bucket is full again; none: it is full
-- ARGV     rate (units per second), capacity (units), units that are wanted
-- Returns the seconds to wait; "0": the units were taken.
local rate, capacity, units = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local missing = math.min(units, capacity) - (capacity - (full_at - now) * rate)
-- A caller that waited for exactly as long as it was told is let through.
if missing > 1e-5 then
  return string.format('%.6f', missing / rate)
end
full_at = full_at + units / rate
-- A full Redis takes what follows a write that frees something.
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], string.format('%.6f', full_at), 'PX', math.ceil((full_at - now) * 1000))
return '0'
