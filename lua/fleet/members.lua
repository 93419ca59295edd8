-- fleet/members: who belongs to the fleet, when each was last heard of, and what time it is.
--
-- Guarantee: one consistent moment; a demoted primary answers READONLY instead of something old.
-- KEYS 2
--   1 hash {ctl}:members
--   2 zset {ctl}:hb
-- ARGV 0
-- RETURN
--   OK now records beats: ms; member, JSON, member, JSON..; member, ms, member, ms..
-- Cost: O(members)
-- Callers: controller, cli
--@include lib/digits
--@include lib/now_ms
local members, hb = KEYS[1], KEYS[2]
redis.call('HDEL', members, '')

local now = digits(now_ms())
local beats = redis.call('ZRANGE', hb, '0', '-1', 'WITHSCORES')
return { 'OK', now, redis.call('HGETALL', members), beats }
