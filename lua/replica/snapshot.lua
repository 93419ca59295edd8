-- replica/snapshot: everything that routing needs of one model, at one version.
--
-- Guarantee: one consistent moment; a demoted primary answers READONLY instead of something old.
-- KEYS 3
--   1 string {M}:ver
--   2 hash {M}:replicas
--   3 hash {M}:spec
-- ARGV 0
-- RETURN
--   OK ver replicas spec: both hashes as field, value, field, value..
-- Cost: O(replicas)
-- Callers: proxy, controller, agent, cli
local ver, replicas, spec = KEYS[1], KEYS[2], KEYS[3]
redis.call('HDEL', replicas, '')

local version = redis.call('GET', ver) or '0'
return { 'OK', version, redis.call('HGETALL', replicas), redis.call('HGETALL', spec) }
