-- ledger/recount: work out every total and score of a model anew from its reservations.
--
-- Guarantee: right at any moment and under any load, because one step reads all reservations and
--   writes what follows from them; what is right is not touched. A holder that `px` does not know
--   is put there: if it is dead, it will be reaped. Nothing is done while a proxy is not named.
-- KEYS 5+
--   1 zset {M}:ready
--   2 hash {M}:weight
--   3 hash {M}:cost
--   4 hash {M}:nreq
--   5 zset {M}:px
--   then, for each proxy: hash {M}:lease:<proxy>
-- ARGV 0+
--   then, for each lease hash: proxy
-- RETURN
--   OK corrected requests: totals and scores that were wrong; reservations that there are
--   CONFLICT proxy: it is in px, and was not named
-- Cost: O(reservations + replicas)
-- Callers: proxy, cli
--@include lib/digits
--@include lib/now_ms
--@include lib/lease_of
--@include lib/rates
--@include lib/score
local ready, weight, cost, nreq, px = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
redis.call('ZREM', ready, '')
redis.call('HDEL', cost, '')
redis.call('HDEL', nreq, '')
redis.call('ZREM', px, '')

local named = {}
for index = 1, #ARGV do
  named[ARGV[index]] = true
end
for _, proxy in ipairs(redis.call('ZRANGE', px, '0', '-1')) do
  if not named[proxy] and string.find(proxy, '^%w[%w%._:/@+-]*$') and #proxy <= 128 then
    return { 'CONFLICT', proxy }
  end
end
local requests, costs, total = {}, {}, 0
for index = 6, #KEYS do
  local leases = redis.call('HVALS', KEYS[index])
  for _, text in ipairs(leases) do
    local rid, held = lease_of(text)
    if rid then
      requests[rid] = (requests[rid] or 0) + 1
      costs[rid] = (costs[rid] or 0) + held
      total = total + 1
    end
  end
  if #leases > 0 and not redis.call('ZSCORE', px, ARGV[index - 5]) then
    redis.call('ZADD', px, digits(now_ms()), ARGV[index - 5])
  end
end
local corrected, known = 0, {}
local function correct(key, right)
  local stored = redis.call('HGETALL', key)
  for index = 1, #stored, 2 do
    local field, wanted = stored[index], right[stored[index]]
    if not wanted then
      corrected = corrected + redis.call('HDEL', key, field)
    elseif stored[index + 1] == digits(wanted) then
      right[field] = nil
    end
  end
  for field, wanted in pairs(right) do
    redis.call('HSET', key, field, digits(wanted))
    corrected = corrected + 1
  end
end
local scores = redis.call('ZRANGE', ready, '0', '-1', 'WITHSCORES')
for index = 1, #scores, 2 do
  local rid = scores[index]
  local place = score(costs[rid] or 0, requests[rid] or 0,
    rates(redis.call('HGET', weight, rid), known))
  if tonumber(scores[index + 1]) ~= place then
    redis.call('ZADD', ready, 'XX', digits(place), rid)
    corrected = corrected + 1
  end
end
requests['*'] = total > 0 and total or nil
correct(nreq, requests)
correct(cost, costs)
return { 'OK', corrected, total }
