-- fleet/declare: store what an operator wants of one model.
--
-- Guarantee: compare-and-set on the generation (0: not there, or not readable), so that two
--   operators cannot undo each other unseen. A repeat changes nothing.
-- KEYS 2
--   1 hash {ctl}:deployments
--   2 hash {ctl}:revisions
-- ARGV 5
--   1 model: name
--   2 expected: generation
--   3 deployment: JSON
--   4 revision: name
--   5 spec: JSON
-- RETURN
--   OK
--   CONFLICT generation: somebody else was faster
-- Cost: O(1)
-- Callers: cli
local deployments, revisions = KEYS[1], KEYS[2]
local model, expected, deployment = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local revision, spec = ARGV[4], ARGV[5]
redis.call('HDEL', deployments, '')
redis.call('HDEL', revisions, '')

local stored = redis.call('HGET', deployments, model)
local parsed, content = pcall(cjson.decode, stored or 'null')
local generation = parsed and type(content) == 'table' and tonumber(content.generation) or 0
if stored == deployment then
  return { 'OK' }
elseif generation ~= expected then
  return { 'CONFLICT', string.format('%.0f', generation) }
end
redis.call('HSET', deployments, model, deployment)
redis.call('HSET', revisions, model .. '@' .. revision, spec)
return { 'OK' }
