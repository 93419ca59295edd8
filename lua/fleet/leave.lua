-- fleet/leave: a process of the fleet is gone: it says so itself, or the leader gives it up.
--
-- Guarantee: record and time go together; a controller of a lower epoch is refused.
-- KEYS 4
--   1 string {ctl}:epoch
--   2 hash {ctl}:leader
--   3 hash {ctl}:members
--   4 zset {ctl}:hb
-- ARGV 3
--   1 member: <kind>:<id>
--   2 epoch: fencing number, empty for the member itself
--   3 owner: name, empty for the member itself
-- RETURN
--   OK changed: 1 or 0
--   FENCED epoch owner: another controller leads
-- Cost: O(log members)
-- Callers: proxy, controller, agent
--@include lib/outdated
local epoch, leader, members, hb = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local member, mine, owner = ARGV[1], ARGV[2], ARGV[3]
redis.call('ZREM', hb, '')
redis.call('HDEL', members, '')

local refusal = mine ~= '' and outdated(epoch, leader, mine, owner) or nil
if refusal then
  return refusal
end
redis.call('ZREM', hb, member)
return { 'OK', redis.call('HDEL', members, member) }
