-- fleet/tell: append what the leader has to say to the fleet's events.
--
-- Guarantee: only by the leader: one that was paused does not report as news what is long past. The
--   oldest events beyond the number to keep are dropped.
-- KEYS 3
--   1 string {ctl}:epoch
--   2 hash {ctl}:leader
--   3 stream {ctl}:events
-- ARGV 3+
--   1 epoch: fencing number
--   2 owner: name
--   3 kept: events
--   then: field value ..
-- RETURN
--   OK
--   FENCED epoch owner: another controller leads
-- Cost: O(1)
-- Callers: controller
--@include lib/outdated
local epoch, leader, events = KEYS[1], KEYS[2], KEYS[3]
local mine, owner, kept = ARGV[1], ARGV[2], ARGV[3]
redis.call('HDEL', leader, '')

local refusal = outdated(epoch, leader, mine, owner)
if refusal then
  return refusal
end
redis.call('XADD', events, 'MAXLEN', '~', kept, '*', unpack(ARGV, 4))
return { 'OK' }
