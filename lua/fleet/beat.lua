-- fleet/beat: a process of the fleet says that it lives and who it is.
--
-- Guarantee: record and time change together; the time is Redis' own.
-- KEYS 2
--   1 hash {ctl}:members
--   2 zset {ctl}:hb
-- ARGV 2
--   1 member: <kind>:<id>
--   2 record: JSON
-- RETURN
--   OK
-- Cost: O(log members)
-- Callers: proxy, controller, agent
--@include lib/digits
--@include lib/now_ms
local members, hb = KEYS[1], KEYS[2]
local member, record = ARGV[1], ARGV[2]
redis.call('HDEL', members, '')
redis.call('ZREM', hb, '')

redis.call('HSET', members, member, record)
redis.call('ZADD', hb, digits(now_ms()), member)
return { 'OK' }
