-- replica/transition: move a replica to another state and patch its record, or only patch it.
--
-- Guarantee: compare-and-set on incarnation and state, only along the table in lib/states; a
--   controller of a lower epoch is refused. Leaving READY takes the replica out of `ready` in the
--   same step. A repeat finds the state reached and changes nothing.
-- KEYS 7
--   1 hash {M}:fence
--   2 hash {M}:replicas
--   3 string {M}:ver
--   4 zset {M}:ready
--   5 hash {M}:weight
--   6 hash {M}:cost
--   7 hash {M}:nreq
-- ARGV 8
--   1 channel: name
--   2 rid: name
--   3 gen: incarnation
--   4 expect: state, empty for any (patch only)
--   5 to: state, empty to patch only
--   6 patch: JSON object
--   7 epoch: fencing number, empty for an agent
--   8 owner: name, empty for an agent
-- RETURN
--   OK ver state
--   FENCED epoch owner: another controller leads
--   ABSENT: no such record, or it does not parse
--   STALEGEN gen: the record is of another incarnation
--   CONFLICT state: the replica is in another state than expected
--   ILLEGAL from to: no such transition
-- Cost: O(log replicas)
-- Callers: controller, agent
--@include lib/fenced
--@include lib/record_of
--@include lib/states
--@include lib/enter
local fence = KEYS[1]
local keys = { replicas = KEYS[2], ver = KEYS[3], ready = KEYS[4], weight = KEYS[5],
  cost = KEYS[6], nreq = KEYS[7] }
local channel, rid, gen, expect, to = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local patch, epoch, owner = ARGV[6], ARGV[7], ARGV[8]
redis.call('HDEL', fence, '')
redis.call('HDEL', keys.replicas, '')
redis.call('ZREM', keys.ready, '')
redis.call('HDEL', keys.weight, '')

local record = record_of(redis.call('HGET', keys.replicas, rid))
local changes = cjson.decode(patch)
local refusal = epoch ~= '' and fenced(fence, epoch, owner) or nil
if refusal then
  return refusal
elseif not record then
  return { 'ABSENT' }
elseif record.gen ~= gen then
  return { 'STALEGEN', digits(record.gen) }
elseif to ~= '' and record.state == to then
  return { 'OK', digits(tonumber(record.ver) or 0), to }
elseif expect ~= '' and record.state ~= expect then
  return { 'CONFLICT', record.state }
elseif to ~= '' and not (states()[record.state] or {})[to] then
  return { 'ILLEGAL', record.state, to }
end
local changed = to ~= ''
for name, value in pairs(changes) do
  changed = changed or record[name] ~= value
  record[name] = value
end
if not changed then
  return { 'OK', digits(tonumber(record.ver) or 0), record.state }
end
if to ~= '' then
  record.state = to
  record.since_ms = now_ms()
end
return { 'OK', enter(keys, rid, record, channel), record.state }
