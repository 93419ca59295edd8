-- spec/write: write a model's routing spec, or with no fields only raise the model's fence.
--
-- Guarantee: the fields replace the old ones at once; a controller of a lower epoch is refused. The
--   same fields again change neither version nor routes.
-- KEYS 3
--   1 hash {M}:fence
--   2 hash {M}:spec
--   3 string {M}:ver
-- ARGV 3+
--   1 epoch: fencing number
--   2 owner: name
--   3 channel: name
--   then: field value ..
-- RETURN
--   OK ver
--   FENCED epoch owner: another controller leads
-- Cost: O(fields)
-- Callers: controller
--@include lib/fenced
--@include lib/next_version
--@include lib/now_ms
--@include lib/digits
local fence, spec, ver = KEYS[1], KEYS[2], KEYS[3]
local epoch, owner, channel = ARGV[1], ARGV[2], ARGV[3]
redis.call('HDEL', fence, '')
redis.call('HDEL', spec, '')

local previous = redis.call('GET', ver) or '0'
local stored = redis.call('HGETALL', spec)
local refusal = fenced(fence, epoch, owner)
if refusal then
  return refusal
elseif #ARGV < 5 then
  return { 'OK', previous }
end
local old, wanted = {}, {}
for index = 1, #stored, 2 do
  old[stored[index]] = stored[index + 1]
end
local changed = not old.epoch
for index = 4, #ARGV - 1, 2 do
  wanted[ARGV[index]] = true
  if old[ARGV[index]] ~= ARGV[index + 1] then
    changed = true
    redis.call('HSET', spec, ARGV[index], ARGV[index + 1])
  end
end
for field in pairs(old) do
  if not wanted[field] and field ~= 'epoch' then
    changed = true
    redis.call('HDEL', spec, field)
  end
end
redis.call('HSET', spec, 'epoch', epoch)
if not changed then
  return { 'OK', previous }
end
local version = digits(next_version(previous, now_ms()))
redis.call('SET', ver, version)
redis.call('PUBLISH', channel, previous .. ' ' .. version .. ' * null')
return { 'OK', version }
