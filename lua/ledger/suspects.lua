-- ledger/suspects: which proxies are silent for so long that they may be reaped.
--
-- Guarantee: two phases. A silent proxy is marked first and named only when the mark is older than
--   the grace: after an outage everybody looks silent, and everybody gets the time to beat.
-- KEYS 2
--   1 zset {M}:px
--   2 zset {M}:suspect
-- ARGV 2
--   1 silence: ms
--   2 grace: ms
-- RETURN
--   OK proxy..: those to reap, at most 100
-- Cost: O(silent proxies), at most 100
-- Callers: proxy
--@include lib/whole
--@include lib/digits
--@include lib/now_ms
local px, suspect = KEYS[1], KEYS[2]
local silence = whole(ARGV[1], 5000, 1, 1e9)
local grace = whole(ARGV[2], 2000, 0, 1e9)
redis.call('ZREM', px, '')
redis.call('ZREM', suspect, '')

local now = now_ms()
for _, key in ipairs({ px, suspect }) do
  -- Times in the future come from a clock that went back: they count from now on.
  local ahead = '(' .. digits(now)
  for _, proxy in ipairs(redis.call('ZRANGEBYSCORE', key, ahead, '+inf', 'LIMIT', '0', '100')) do
    redis.call('ZADD', key, digits(now), proxy)
  end
end
local reply = { 'OK' }
local due = '(' .. digits(now - silence)
for _, proxy in ipairs(redis.call('ZRANGEBYSCORE', px, '-inf', due, 'LIMIT', '0', '100')) do
  local marked = tonumber(redis.call('ZSCORE', suspect, proxy) or nil)
  if not marked then
    redis.call('ZADD', suspect, digits(now), proxy)
  elseif marked <= now - grace then
    reply[#reply + 1] = proxy
  end
end
return reply
