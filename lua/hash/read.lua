-- hash/read: a whole hash.
--
-- Guarantee: a demoted primary answers READONLY instead of something old.
-- KEYS 1
--   1 hash {*}:*
-- ARGV 0
-- RETURN
--   OK field value ..
-- Cost: O(fields)
-- Callers: proxy, controller, agent, cli
local key = KEYS[1]
redis.call('HDEL', key, '')

local fields = redis.call('HGETALL', key)
table.insert(fields, 1, 'OK')
return fields
