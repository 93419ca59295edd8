-- fleet/order: give an order to a host's agent, or take it back.
--
-- Guarantee: only by the leader; the same order again changes nothing.
-- KEYS 2
--   1 string {ctl}:epoch
--   2 hash {ctl}:orders:<host>
-- ARGV 3
--   1 epoch: fencing number
--   2 rid: name
--   3 order: JSON, empty to drop it
-- RETURN
--   OK changed: 1 or 0
--   FENCED epoch owner: another controller leads
-- Cost: O(1)
-- Callers: controller
--@include lib/outdated
local epoch, orders = KEYS[1], KEYS[2]
local mine, rid, order = ARGV[1], ARGV[2], ARGV[3]
redis.call('HDEL', orders, '')

local stored = redis.call('HGET', orders, rid)
local refusal = outdated(epoch, mine)
if refusal then
  return refusal
elseif order == '' then
  return { 'OK', redis.call('HDEL', orders, rid) }
elseif stored == order then
  return { 'OK', 0 }
end
redis.call('HSET', orders, rid, order)
return { 'OK', 1 }
