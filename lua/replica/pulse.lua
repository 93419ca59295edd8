-- replica/pulse: when each replica last beat, what its engine reported, and what time it is.
--
-- Guarantee: one consistent moment; a demoted primary answers READONLY instead of something old.
-- KEYS 2
--   1 zset {M}:hb
--   2 hash {M}:stat
-- ARGV 0
-- RETURN
--   OK now beats stats: ms; rid, ms, rid, ms..; rid, text, rid, text..
-- Cost: O(replicas)
-- Callers: controller, cli
--@include lib/digits
--@include lib/now_ms
local hb, stat = KEYS[1], KEYS[2]
redis.call('ZREM', hb, '')

local now = digits(now_ms())
return { 'OK', now, redis.call('ZRANGE', hb, '0', '-1', 'WITHSCORES'), redis.call('HGETALL', stat) }
