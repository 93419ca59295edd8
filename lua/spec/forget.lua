-- spec/forget: delete every key of a model that has no replicas any more, except its fence.
--
-- Guarantee: refuses while a replica is recorded or a proxy holds a reservation; a controller of a
--   lower epoch is refused, and stays refused: without the fence, what a paused one sends late would
--   bring the model's keys back, and nobody looks after a model that is not declared.
-- KEYS 13
--   1 hash {M}:fence
--   2 hash {M}:spec
--   3 string {M}:ver
--   4 hash {M}:replicas
--   5 zset {M}:ready
--   6 hash {M}:weight
--   7 hash {M}:cost
--   8 hash {M}:nreq
--   9 zset {M}:px
--   10 zset {M}:suspect
--   11 hash {M}:wait
--   12 zset {M}:hb
--   13 hash {M}:stat
-- ARGV 3
--   1 epoch: fencing number
--   2 owner: name
--   3 channel: name
-- RETURN
--   OK ver
--   FENCED epoch owner: another controller leads
--   CONFLICT what: replicas or reservations are left
-- Cost: O(keys' sizes), once in a model's life
-- Callers: controller
--@include lib/fenced
--@include lib/whole
--@include lib/next_version
--@include lib/now_ms
--@include lib/digits
local fence, ver, replicas, nreq = KEYS[1], KEYS[3], KEYS[4], KEYS[8]
local epoch, owner, channel = ARGV[1], ARGV[2], ARGV[3]
redis.call('HDEL', fence, '')

local previous = redis.call('GET', ver) or '0'
local recorded = redis.call('HLEN', replicas)
local held = whole(redis.call('HGET', nreq, '*'), 0, 0, 1e9)
local refusal = fenced(fence, epoch, owner)
if refusal then
  return refusal
elseif recorded > 0 or held > 0 then
  return { 'CONFLICT', string.format('%d replicas, %d reservations', recorded, held) }
end
local version = digits(next_version(previous, now_ms()))
for index = 2, 13 do
  redis.call('DEL', KEYS[index])
end
redis.call('PUBLISH', channel, previous .. ' ' .. version .. ' * null')
return { 'OK', version }
