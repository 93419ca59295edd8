-- fleet/set_aside: move foreign data out of a key that is ours.
--
-- Guarantee: type and rename are one act, so that what belongs there and was just written is never
--   moved. Nothing is deleted before its life is over. No fence: it rests on no earlier reading,
--   and the key it is called for may be the leader's own.
-- KEYS 2
--   1 any {*}:*
--   2 any {*}:*
-- ARGV 2
--   1 kind: type that belongs there
--   2 life: ms, of what is set aside
-- RETURN
--   OK moved: 1 or 0
-- Cost: O(1)
-- Callers: controller, agent
local key, aside, kind = KEYS[1], KEYS[2], ARGV[1]
local guard = redis.pcall('HDEL', key, '')
if type(guard) == 'table' and not string.find(tostring(guard.err), 'WRONGTYPE', 1, true) then
  return guard
end

local found = redis.call('TYPE', key).ok
if found == kind or found == 'none' then
  return { 'OK', 0 }
end
redis.call('RENAME', key, aside)
redis.call('PEXPIRE', aside, ARGV[2])
return { 'OK', 1 }
