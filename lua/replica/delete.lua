-- replica/delete: remove the record of a replica that has ended.
--
-- Guarantee: only STOPPED and FAILED, only this incarnation, only by the leader. What requests
--   still hold on it stays counted until they release.
-- KEYS 7
--   1 hash {M}:fence
--   2 hash {M}:replicas
--   3 string {M}:ver
--   4 zset {M}:ready
--   5 hash {M}:weight
--   6 zset {M}:hb
--   7 hash {M}:stat
-- ARGV 5
--   1 channel: name
--   2 rid: name
--   3 gen: incarnation
--   4 epoch: fencing number
--   5 owner: name
-- RETURN
--   OK ver state
--   FENCED epoch owner: another controller leads
--   ABSENT: no such record, or it does not parse
--   STALEGEN gen: the record is of another incarnation
--   ILLEGAL state: the replica has not ended
-- Cost: O(log replicas)
-- Callers: controller
--@include lib/fenced
--@include lib/record_of
--@include lib/next_version
--@include lib/now_ms
--@include lib/digits
local fence, replicas, ver, ready = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local weight, hb, stat = KEYS[5], KEYS[6], KEYS[7]
local channel, rid, gen, epoch, owner = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
redis.call('HDEL', fence, '')
redis.call('HDEL', replicas, '')
redis.call('ZREM', ready, '')
redis.call('HDEL', weight, '')
redis.call('ZREM', hb, '')
redis.call('HDEL', stat, '')

local text = redis.call('HGET', replicas, rid)
local record = record_of(text)
local refusal = fenced(fence, epoch, owner)
if refusal then
  return refusal
elseif not text then
  return { 'ABSENT' }
elseif record and record.gen ~= gen then
  return { 'STALEGEN', digits(record.gen) }
elseif record and record.state ~= 'STOPPED' and record.state ~= 'FAILED' then
  return { 'ILLEGAL', record.state }
end
local previous = redis.call('GET', ver) or '0'
local version = digits(next_version(previous, now_ms()))
redis.call('SET', ver, version)
redis.call('HDEL', replicas, rid)
redis.call('HDEL', weight, rid)
redis.call('ZREM', ready, rid)
redis.call('ZREM', hb, rid)
redis.call('HDEL', stat, rid)
redis.call('PUBLISH', channel, previous .. ' ' .. version .. ' ' .. rid .. ' null')
return { 'OK', version, record and record.state or 'FAILED' }
