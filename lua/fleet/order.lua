-- fleet/order: give an order to a host's agent, or take it back.
--
-- Guarantee: only by the leader; the same order again changes nothing.
-- KEYS 3
--   1 string {ctl}:epoch
--   2 hash {ctl}:leader
--   3 hash {ctl}:orders:<host>
-- ARGV 4
--   1 epoch: fencing number
--   2 owner: name
--   3 rid: name
--   4 order: JSON, empty to drop it
-- RETURN
--   OK changed: 1 or 0
--   FENCED epoch owner: another controller leads
-- Cost: O(1)
-- Callers: controller
--@include lib/outdated
local epoch, leader, orders = KEYS[1], KEYS[2], KEYS[3]
local mine, owner, rid, order = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
redis.call('HDEL', orders, '')

local stored = redis.call('HGET', orders, rid)
local refusal = outdated(epoch, leader, mine, owner)
if refusal then
  return refusal
elseif order == '' then
  return { 'OK', redis.call('HDEL', orders, rid) }
elseif stored == order then
  return { 'OK', 0 }
end
redis.call('HSET', orders, rid, order)
return { 'OK', 1 }
