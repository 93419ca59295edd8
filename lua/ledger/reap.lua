-- ledger/reap: drop what a dead proxy held, a bounded number of reservations at a time.
--
-- Guarantee: refuses while the proxy beats. Totals and scores follow from the reservations; the
--   proxy is forgotten with its last reservation.
-- KEYS 8
--   1 zset {M}:ready
--   2 hash {M}:weight
--   3 hash {M}:cost
--   4 hash {M}:nreq
--   5 hash {M}:lease:<proxy>
--   6 zset {M}:px
--   7 hash {M}:wait
--   8 zset {M}:suspect
-- ARGV 3
--   1 proxy: name
--   2 silence: ms
--   3 limit: reservations
-- RETURN
--   OK dropped left: call again while left > 0
--   ALIVE: it has beaten; nothing was done
-- Cost: O(limit), limit at most 1000
-- Callers: proxy, cli
--@include lib/whole
--@include lib/now_ms
--@include lib/lease_of
--@include lib/accounts
local keys = { ready = KEYS[1], weight = KEYS[2], cost = KEYS[3], nreq = KEYS[4] }
local lease, px, wait, suspect = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local proxy = ARGV[1]
local silence = whole(ARGV[2], 5000, 1, 1e9)
local limit = whole(ARGV[3], 100, 1, 1000)
redis.call('ZREM', keys.ready, '')
redis.call('HDEL', keys.cost, '')
redis.call('HDEL', keys.nreq, '')
redis.call('HDEL', lease, '')
redis.call('ZREM', px, '')
redis.call('HDEL', wait, '')
redis.call('ZREM', suspect, '')

local beat = tonumber(redis.call('ZSCORE', px, proxy) or nil)
if beat and beat >= now_ms() - silence then
  return { 'ALIVE' }
end
local book = accounts(keys)
local names, at = book.names, book.at
local found, cursor = {}, '0'
repeat
  local page = redis.call('HSCAN', lease, cursor, 'COUNT', string.format('%d', limit))
  cursor = page[1]
  for index = 1, math.min(#page[2], 2 * limit - #found) do
    found[#found + 1] = page[2][index]
  end
until cursor == '0' or #found >= 2 * limit
local texts, requests = {}, {}
for index = 1, #found, 2 do
  local request, rid = found[index], lease_of(found[index + 1])
  -- A scan may name a field twice.
  if not texts[request] then
    texts[request], requests[#requests + 1] = found[index + 1], request
  end
  if rid and not at[rid] then
    names[#names + 1] = rid
    at[rid] = #names
  end
end
book.read(1)
for _, request in ipairs(requests) do
  local rid, cost = lease_of(texts[request])
  if rid then
    book.charge(at[rid], -1, -cost)
  end
end
book.settle()
local dropped = #requests > 0 and redis.call('HDEL', lease, unpack(requests)) or 0
local left = redis.call('HLEN', lease)
if left == 0 then
  redis.call('ZREM', px, proxy)
  redis.call('ZREM', suspect, proxy)
  redis.call('HDEL', wait, proxy)
end
return { 'OK', dropped, left }
