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
--   A request cost(tokens) random(integer) naffinity nexclude pair.. exclude..
--     where pair is a replica that affinity prefers, and the cost(tokens) there
--   R request
--   D request rid cost(tokens)
-- RETURN
--   ver result..: routing version; A: rid, !BUSY (all full) or !NONE; R and D: 1 changed, 0 not
--   error BADOP: an argument makes no sense; nothing was done
-- Cost: O(log replicas) per operation, at most 64 operations, 16 candidates and 16 exclusions each
-- Callers: proxy
--@include lib/operations
--@include lib/choose
--@include lib/lease_of
--@include lib/charge
--@include lib/settle
--@include lib/now_ms
local keys = { ready = KEYS[1], weight = KEYS[2], cost = KEYS[3], nreq = KEYS[4] }
local lease, px, ver, spec = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local proxy = ARGV[1]
redis.call('ZREM', keys.ready, '')
redis.call('HDEL', keys.cost, '')
redis.call('HDEL', keys.nreq, '')
redis.call('HDEL', lease, '')
redis.call('ZREM', px, '')

local batch, bad = operations(ARGV, 2)
if not batch then
  return redis.error_reply('BADOP argument ' .. bad .. ' makes no sense')
end
local limits = redis.call('HMGET', spec, 'max_requests', 'affinity_absolute', 'affinity_relative')
local max_requests = whole(limits[1], 1e9, 0, 1e9)
local absolute = whole(limits[2], 0, 0, 1e9) * 1000
local relative = math.max(1, math.min(1000, tonumber(limits[3]) or 1))
local book = { accounts = {}, total = whole(redis.call('HGET', keys.nreq, '*'), 0, 0, 1e9) }
local reply = { redis.call('GET', ver) or '0' }
local known = redis.call('ZSCORE', px, proxy)

for _, operation in ipairs(batch) do
  local request = operation.request
  local rid, cost = lease_of(redis.call('HGET', lease, request))
  local wanted = operation.rid
  local keep = operation.verb == 'A' and rid and not operation.excluded[rid]
    or operation.verb == 'D' and rid == wanted and cost == operation.cost
  if keep then
    reply[#reply + 1] = operation.verb == 'A' and rid or 0
  else
    local removed = redis.call('HDEL', lease, request)
    if rid then
      charge(keys, book, rid, -1, -cost)
    end
    if operation.verb == 'A' then
      wanted = book.total >= max_requests and '!BUSY'
        or choose(keys, operation, absolute, relative)
    end
    if wanted and string.sub(wanted, 1, 1) ~= '!' then
      local price = operation.costs[wanted] or operation.cost
      redis.call('HSET', lease, request, string.format('%s %.0f', wanted, price))
      charge(keys, book, wanted, 1, price)
      if not known then
        known = redis.call('ZADD', px, string.format('%.0f', now_ms()), proxy)
      end
    end
    reply[#reply + 1] = operation.verb == 'A' and wanted or wanted and 1 or removed
  end
end
settle(keys, book)
return reply
