-- ledger/books: all accounts of a model at one moment, for those who check them.
--
-- Guarantee: one consistent moment; a demoted primary answers READONLY instead of something old.
-- KEYS 4+
--   1 zset {M}:ready
--   2 hash {M}:weight
--   3 hash {M}:cost
--   4 hash {M}:nreq
--   then, for each proxy to look at: hash {M}:lease:<proxy>
-- ARGV 0
-- RETURN
--   OK ready weights costs requests leases..: rid, score, rid, score..; four hashes as field, value,
--   field, value.., the last of them once for each proxy
-- Cost: O(reservations + replicas)
-- Callers: cli
local ready, weight, cost, nreq = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
redis.call('ZREM', ready, '')

local reply = { 'OK', redis.call('ZRANGE', ready, '0', '-1', 'WITHSCORES'),
  redis.call('HGETALL', weight), redis.call('HGETALL', cost), redis.call('HGETALL', nreq) }
for index = 5, #KEYS do
  reply[#reply + 1] = redis.call('HGETALL', KEYS[index])
end
return reply
