-- Returns the time in milliseconds by the clock of the node that has the shard's keys.
--
-- ARGV: prefix
return now()
