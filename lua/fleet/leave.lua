-- fleet/leave: a process of the fleet is gone.
--
-- Guarantee: record and time go together.
-- KEYS 2
--   1 hash {ctl}:members
--   2 zset {ctl}:hb
-- ARGV 1
--   1 member: <kind>:<id>
-- RETURN
--   OK changed: 1 or 0
-- Cost: O(log members)
-- Callers: proxy, controller, agent
local members, hb = KEYS[1], KEYS[2]
local member = ARGV[1]
redis.call('ZREM', hb, '')

redis.call('ZREM', hb, member)
return { 'OK', redis.call('HDEL', members, member) }
