-- Returns the time in milliseconds by the clock of the node that has the keys.
--
-- ARGV: prefix, group
return now()
