-- fleet/forget_host: remove a host that is gone, its orders and its agent's membership.
--
-- Guarantee: only by the leader; a host that comes back registers itself again.
-- KEYS 5
--   1 string {ctl}:epoch
--   2 hash {ctl}:hosts
--   3 hash {ctl}:orders:<host>
--   4 hash {ctl}:members
--   5 zset {ctl}:hb
-- ARGV 2
--   1 epoch: fencing number
--   2 host: name
-- RETURN
--   OK changed: 1 or 0
--   FENCED epoch owner: another controller leads
-- Cost: O(orders of the host)
-- Callers: controller
--@include lib/outdated
local epoch, hosts, orders, members, hb = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local mine, host = ARGV[1], ARGV[2]
redis.call('HDEL', hosts, '')
redis.call('HDEL', members, '')
redis.call('ZREM', hb, '')

local refusal = outdated(epoch, mine)
if refusal then
  return refusal
end
redis.call('DEL', orders)
redis.call('HDEL', members, 'agent:' .. host)
redis.call('ZREM', hb, 'agent:' .. host)
return { 'OK', redis.call('HDEL', hosts, host) }
