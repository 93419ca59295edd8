-- fleet/forget_host: remove a host that is gone, its orders and its agent's membership.
--
-- Guarantee: only by the leader; a host that comes back registers itself again.
-- KEYS 6
--   1 string {ctl}:epoch
--   2 hash {ctl}:leader
--   3 hash {ctl}:hosts
--   4 hash {ctl}:orders:<host>
--   5 hash {ctl}:members
--   6 zset {ctl}:hb
-- ARGV 3
--   1 epoch: fencing number
--   2 owner: name
--   3 host: name
-- RETURN
--   OK changed: 1 or 0
--   FENCED epoch owner: another controller leads
-- Cost: O(orders of the host)
-- Callers: controller
--@include lib/outdated
local epoch, leader, hosts, orders = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local members, hb = KEYS[5], KEYS[6]
local mine, owner, host = ARGV[1], ARGV[2], ARGV[3]
redis.call('HDEL', hosts, '')
redis.call('HDEL', members, '')
redis.call('ZREM', hb, '')

local refusal = outdated(epoch, leader, mine, owner)
if refusal then
  return refusal
end
redis.call('DEL', orders)
redis.call('HDEL', members, 'agent:' .. host)
redis.call('ZREM', hb, 'agent:' .. host)
return { 'OK', redis.call('HDEL', hosts, host) }
