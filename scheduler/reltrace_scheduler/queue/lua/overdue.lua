-- Returns ids of jobs whose timeout is over.
--
-- KEYS[1] deadlines  zset  read
--
-- ARGV: prefix, group, most ids
return redis.call("ZRANGEBYSCORE", KEYS[1], "-inf", now(), "LIMIT", 0, ARGV[3])
