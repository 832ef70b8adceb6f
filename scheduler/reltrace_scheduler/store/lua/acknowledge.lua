-- Frees results that the client has.
--
-- KEYS[1] results:<sub>            stream  entries up to `through` deleted
-- KEYS[2] submission:<sub>         hash    deleted with the last result
-- also: job:<job>                  hash    deleted
--       chunks:<job>:<attempt>     list    deleted
--
-- ARGV: prefix, through
--
-- Returns how many results were freed.
local prefix, through = ARGV[1], ARGV[2]
local entries = redis.call("XRANGE", KEYS[1], "-", through .. "-0")
for _, entry in ipairs(entries) do
    local fields = entry[2]
    redis.call("DEL", prefix .. "job:" .. fields[2])
    if fields[3] == "l" then
        redis.call("DEL", fields[4])
    end
    redis.call("XDEL", KEYS[1], entry[1])
end
local held = redis.call("HMGET", KEYS[2], "jobs", "ended")
if held[1] and held[1] == held[2] and redis.call("XLEN", KEYS[1]) == 0 then
    redis.call("DEL", KEYS[1], KEYS[2])
end
return #entries
