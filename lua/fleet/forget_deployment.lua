-- fleet/forget_deployment: remove a deployment and its revisions, once its last replica is gone.
--
-- Guarantee: only a deployment that is marked deleted (or does not parse), only by the leader. The
--   deletion stays on record: who was away meanwhile must not take it for a loss of data.
-- KEYS 5
--   1 string {ctl}:epoch
--   2 hash {ctl}:leader
--   3 hash {ctl}:deployments
--   4 hash {ctl}:revisions
--   5 hash {ctl}:forgotten
-- ARGV 3
--   1 epoch: fencing number
--   2 owner: name
--   3 model: name
-- RETURN
--   OK
--   FENCED epoch owner: another controller leads
--   CONFLICT generation: it has been declared again
-- Cost: O(revisions)
-- Callers: controller
--@include lib/outdated
local epoch, leader, deployments, revisions = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local forgotten = KEYS[5]
local mine, owner, model = ARGV[1], ARGV[2], ARGV[3]
redis.call('HDEL', deployments, '')
redis.call('HDEL', revisions, '')
redis.call('HDEL', forgotten, '')

local stored = redis.call('HGET', deployments, model)
local parsed, content = pcall(cjson.decode, stored or 'null')
local refusal = outdated(epoch, leader, mine, owner)
if refusal then
  return refusal
elseif parsed and type(content) == 'table' and content.deleted ~= true then
  return { 'CONFLICT', tostring(content.generation) }
end
if parsed and type(content) == 'table' then
  redis.call('HSET', forgotten, model, stored)
end
redis.call('HDEL', deployments, model)
local prefix = model .. '@'
for _, field in ipairs(redis.call('HKEYS', revisions)) do
  if string.sub(field, 1, #prefix) == prefix then
    redis.call('HDEL', revisions, field)
  end
end
return { 'OK' }
