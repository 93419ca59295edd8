-- ledger/hot: reserve, release and adopt a batch of requests of one proxy.
--
-- Guarantee: all operations of the batch happen in order and at once; a repeat changes nothing:
--   a request holds one reservation at most, a known one gets its replica again (unless it now
--   excludes that replica: then it moves). Totals and scores follow from the reservations.
-- KEYS 8
--   1 zset {M}:ready
--   2 hash {M}:weight
--   3 hash {M}:cost
--   4 hash {M}:nreq
--   5 hash {M}:lease:<proxy>
--   6 zset {M}:px
--   7 string {M}:ver
--   8 hash {M}:spec
-- ARGV 1+
--   1 proxy: name
--   then, up to 64 times, one of
--   A request cost(tokens) random(integer) naffinity nexclude (rid cost-there(tokens)).. exclude..
--   R request
--   D request rid cost(tokens)
-- RETURN
--   ver result..: routing version; A: rid, !BUSY (all full) or !NONE; R and D: 1 changed, 0 not
--   error BADOP: an argument makes no sense; nothing was done
-- Cost: O(log replicas) per operation, at most 64 operations, 16 candidates and 16 exclusions each;
--   some twenty commands a batch: all is read before the first operation, and written after the last
-- Callers: proxy
--@include lib/operations
--@include lib/holdings
--@include lib/opened
--@include lib/lease_of
--@include lib/choose
--@include lib/charge
--@include lib/settle
--@include lib/hold
--@include lib/digits
--@include lib/now_ms
local keys = { ready = KEYS[1], weight = KEYS[2], cost = KEYS[3], nreq = KEYS[4] }
local lease, px, ver, spec = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local proxy = ARGV[1]
redis.call('HDEL', lease, '')
redis.call('HDEL', keys.cost, '')

local batch, bad = operations(ARGV, 2)
if not batch then
  return redis.error_reply('BADOP argument ' .. bad .. ' makes no sense')
end
local limits = redis.call('HMGET', spec, 'max_requests', 'affinity_absolute', 'affinity_relative')
local max_requests = whole(limits[1], 1e9, 0, 1e9)
local absolute = whole(limits[2], 0, 0, 1e9) * 1000
local relative = math.max(1, math.min(1000, tonumber(limits[3]) or 1))
local reply = { redis.call('GET', ver) or '0' }
local known = redis.call('ZSCORE', px, proxy)
local before, held = holdings(lease, batch)
local book = opened(keys, batch, held)

for index = 1, #batch do
  local operation = batch[index]
  local verb, mine, wanted = operation.verb, held[operation.request], operation.rid
  local rid, cost = lease_of(mine)
  if verb == 'A' and rid and not operation.excluded[rid] then
    reply[index + 1] = rid
  elseif verb == 'D' and rid == wanted and cost == operation.cost then
    reply[index + 1] = 0
  else
    if rid then
      charge(book, rid, -1, -cost)
    end
    if verb == 'A' then
      wanted = book.total >= max_requests and '!BUSY'
        or choose(keys, book, operation, absolute, relative)
    end
    local placed = wanted and string.sub(wanted, 1, 1) ~= '!'
    local price = operation.costs and operation.costs[wanted] or operation.cost
    held[operation.request] = placed and wanted .. ' ' .. digits(price) or false
    if placed then
      charge(book, wanted, 1, price)
    end
    reply[index + 1] = verb == 'A' and wanted or (wanted or mine) and 1 or 0
  end
end
settle(keys, book)
if hold(lease, batch, before, held) and not known then
  redis.call('ZADD', px, digits(now_ms()), proxy)
end
return reply
