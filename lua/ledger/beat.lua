-- ledger/beat: a proxy says that it lives and how many requests wait in its queue.
--
-- Guarantee: registers the proxy, clears any suspicion, and counts what Redis holds for it. Leaves
--   nothing behind for a model that is not there: one that was deleted stays deleted. Sees to it
--   that Redis finds what ledger/hot looks for without a search.
-- KEYS 9
--   1 zset {M}:px
--   2 hash {M}:lease:<proxy>
--   3 hash {M}:wait
--   4 string {M}:ver
--   5 zset {M}:suspect
--   6 zset {M}:ready
--   7 hash {M}:weight
--   8 hash {M}:cost
--   9 hash {M}:nreq
-- ARGV 3
--   1 proxy: name
--   2 waiting: requests
--   3 silence: ms
-- RETURN
--   OK leases ver known waiting silent: known 0 = it had been reaped and must adopt what it
--   relays; waiting = of all proxies; silent = proxies due for ledger/suspects
-- Cost: O(proxies)
-- Callers: proxy
--@include lib/whole
--@include lib/digits
--@include lib/now_ms
--@include lib/spacious
local px, lease, wait, ver, suspect = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local ready, weight, cost, nreq = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local proxy = ARGV[1]
local waiting = whole(ARGV[2], 0, 0, 1e9)
local silence = whole(ARGV[3], 5000, 1, 1e9)
redis.call('ZREM', px, '')
redis.call('ZREM', suspect, '')
redis.call('HDEL', wait, '')

local now = now_ms()
local known = redis.call('ZSCORE', px, proxy) and 1 or 0
local leases = redis.call('HLEN', lease)
local version = redis.call('GET', ver)
if version or leases > 0 then
  redis.call('ZADD', px, digits(now), proxy)
  redis.call('ZREM', suspect, proxy)
end
if waiting > 0 and version then
  redis.call('HSET', wait, proxy, digits(waiting))
else
  redis.call('HDEL', wait, proxy)
end
local total = 0
for _, count in ipairs(redis.call('HVALS', wait)) do
  total = total + whole(count, 0, 0, 1e9)
end
if leases > 16 then
  spacious(lease)
end
if (tonumber(redis.pcall('ZCARD', ready)) or 0) > 16 then
  spacious(ready, true)
  spacious(weight)
  spacious(cost)
  spacious(nreq)
end
-- A beat in the future comes from a clock that went back: ledger/suspects mends it.
local silent = redis.call('ZCOUNT', px, '-inf', '(' .. digits(now - silence))
  + redis.call('ZCOUNT', px, '(' .. digits(now), '+inf')
return { 'OK', leases, version or '0', known, total, silent }
