-- leader/lead: become leader, stay leader, or resign.
--
-- Guarantee: one holder at a time by Redis' clock; each new holder gets a higher epoch, even after
--   a failover forgot the last one. A lease that would last absurdly long (no expiry, or a clock
--   that jumped) is cut to its normal length.
-- KEYS 2
--   1 hash {ctl}:leader
--   2 string {ctl}:epoch
-- ARGV 3
--   1 owner: name
--   2 ttl: ms
--   3 verb: try or resign
-- RETURN
--   LEADING epoch ttl_left
--   FOLLOWING owner ttl_left
--   RESIGNED
-- Cost: O(1)
-- Callers: controller
--@include lib/whole
--@include lib/digits
--@include lib/next_version
--@include lib/now_ms
local leader, epoch = KEYS[1], KEYS[2]
local owner, ttl, verb = ARGV[1], whole(ARGV[2], 5000, 100, 3600000), ARGV[3]
redis.call('HDEL', leader, '')

local held = redis.call('HMGET', leader, 'id', 'epoch')
local last = redis.call('GET', epoch) or '0'
if verb == 'resign' then
  if held[1] == owner then
    redis.call('DEL', leader)
  end
  return { 'RESIGNED' }
elseif held[1] and held[1] ~= owner then
  local left = redis.call('PTTL', leader)
  if left < 0 or left > 4 * ttl then
    redis.call('PEXPIRE', leader, digits(ttl))
    left = ttl
  end
  return { 'FOLLOWING', held[1], left }
elseif not held[1] or held[2] ~= last then
  last = digits(next_version(last, math.max(now_ms(), whole(held[2], 0, 0, 9e15) + 1)))
  redis.call('SET', epoch, last)
  redis.call('HSET', leader, 'id', owner, 'epoch', last, 'since', digits(now_ms()))
end
redis.call('PEXPIRE', leader, digits(ttl))
return { 'LEADING', last, ttl }
