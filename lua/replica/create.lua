-- replica/create: record a new replica, by the controller or by its agent after a loss of data.
--
-- Guarantee: never overwrites a record that parses; a controller of a lower epoch is refused.
-- KEYS 7
--   1 hash {M}:fence
--   2 hash {M}:replicas
--   3 string {M}:ver
--   4 zset {M}:ready
--   5 hash {M}:weight
--   6 hash {M}:cost
--   7 hash {M}:nreq
-- ARGV 5
--   1 channel: name
--   2 rid: name
--   3 record: JSON
--   4 epoch: fencing number, empty for an agent
--   5 owner: name, empty for an agent
-- RETURN
--   OK ver state
--   FENCED epoch owner: another controller leads
--   EXISTS gen state: a record of this replica is there
--   ILLEGAL state: a controller creates PENDING only
-- Cost: O(log replicas)
-- Callers: controller, agent
--@include lib/fenced
--@include lib/record_of
--@include lib/states
--@include lib/enter
local fence = KEYS[1]
local keys = { replicas = KEYS[2], ver = KEYS[3], ready = KEYS[4], weight = KEYS[5],
  cost = KEYS[6], nreq = KEYS[7] }
local channel, rid, json, epoch, owner = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
redis.call('HDEL', fence, '')
redis.call('HDEL', keys.replicas, '')
redis.call('ZREM', keys.ready, '')
redis.call('HDEL', keys.weight, '')

local record = record_of(json)
if not record or not states()[record.state] or epoch ~= '' and record.state ~= 'PENDING' then
  return { 'ILLEGAL', record and record.state or '' }
end
local there = record_of(redis.call('HGET', keys.replicas, rid))
local refusal = epoch ~= '' and fenced(fence, epoch, owner) or nil
if refusal then
  return refusal
elseif there then
  return { 'EXISTS', digits(there.gen), there.state }
end
record.since_ms = now_ms()
return { 'OK', enter(keys, rid, record, channel), record.state }
