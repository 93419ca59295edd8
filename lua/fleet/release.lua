-- fleet/release: drop an operator's hold: the operator takes it back, or its subject is gone.
--
-- Guarantee: a repeat changes nothing; a controller of a lower epoch is refused.
-- KEYS 3
--   1 string {ctl}:epoch
--   2 hash {ctl}:leader
--   3 hash {ctl}:holds
-- ARGV 3
--   1 subject: host:<host> or replica:<id>
--   2 epoch: fencing number, empty for an operator
--   3 owner: name, empty for an operator
-- RETURN
--   OK changed: 1 or 0
--   FENCED epoch owner: another controller leads
-- Cost: O(1)
-- Callers: controller, cli
--@include lib/outdated
local epoch, leader, holds = KEYS[1], KEYS[2], KEYS[3]
local subject, mine, owner = ARGV[1], ARGV[2], ARGV[3]
redis.call('HDEL', holds, '')

local refusal = mine ~= '' and outdated(epoch, leader, mine, owner) or nil
return refusal or { 'OK', redis.call('HDEL', holds, subject) }
