-- zset/read: a whole sorted set.
--
-- Guarantee: a demoted primary answers READONLY instead of something old.
-- KEYS 1
--   1 zset {*}:*
-- ARGV 0
-- RETURN
--   OK member score ..
-- Cost: O(members)
-- Callers: cli
local key = KEYS[1]
redis.call('ZREM', key, '')

local members = redis.call('ZRANGE', key, '0', '-1', 'WITHSCORES')
table.insert(members, 1, 'OK')
return members
