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
--   some twenty commands a batch: all is read before the first operation, and written after the last;
--   up to four operations that exclude no replica are carried out one by one, some twelve commands each
-- Callers: proxy
--@include lib/plain
--@include lib/one
local stores = {
  ready = KEYS[1], weight = KEYS[2], cost = KEYS[3], nreq = KEYS[4], lease = KEYS[5], px = KEYS[6],
  ver = KEYS[7], spec = KEYS[8],
}
local proxy = ARGV[1]
redis.call('HDEL', stores.lease, '')

if plain(ARGV, 2) then
  local reply, at = { redis.call('GET', stores.ver) or '0' }, 2
  while ARGV[at] do
    reply[#reply + 1], at = one(stores, ARGV, at)
  end
  return reply
end
--@include lib/operations
--@include lib/accounts
--@include lib/holdings
--@include lib/choice
--@include lib/apply
--@include lib/hold
--@include lib/now_ms
local batch, bad = operations(ARGV, 2)
if not batch then
  return redis.error_reply('BADOP argument ' .. bad .. ' makes no sense')
end
local reply = { redis.call('GET', stores.ver) or '0' }
local known = not batch.holds or redis.call('ZSCORE', stores.px, proxy)
local book = accounts(stores)
local holding = holdings(stores, batch, book)
local choose = batch.reserves > 0 and choice(stores, book, batch)
book.read(1)

apply(batch, book, holding, choose, reply)
book.settle()
if hold(stores, batch, holding, book.names) and not known then
  redis.call('ZADD', stores.px, string.format('%d', now_ms()), proxy)
end
return reply
