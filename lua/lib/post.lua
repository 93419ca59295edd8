-- post(keys, rid, off, on, cap): write what is outstanding on one replica without a request that held `off`
-- tokens, and with one that holds `on`, each if it is given, and its score. No total falls below zero,
-- and a replica without requests holds no cost. False, and nothing was done, if the model has `cap`
-- requests already.
--@include lib/whole
--@include lib/rates
--@include lib/score
local function post(keys, rid, off, on, cap)
  local format, counts = string.format, redis.call('HMGET', keys.nreq, '*', rid)
  local cost = whole(redis.call('HGET', keys.cost, rid), 0, 0, 4e15)
  local rate = rates(redis.call('HGET', keys.weight, rid), {})
  local total, requests = whole(counts[1], 0, 0, 1e9), whole(counts[2], 0, 0, 1e9)
  if cap and total >= cap then
    return false
  end
  if off then
    total, requests, cost = math.max(0, total - 1), requests - 1, math.max(0, cost - off)
    if requests <= 0 then
      requests, cost = 0, 0
    end
  end
  if on then
    total, requests, cost = total + 1, requests + 1, cost + on
  end
  redis.call('ZADD', keys.ready, 'XX', format('%d', score(cost, requests, rate)), rid)
  if requests > 0 then
    redis.call('HSET', keys.cost, rid, format('%d', cost))
    redis.call('HSET', keys.nreq, '*', format('%d', total), rid, format('%d', requests))
    return true
  end
  redis.call('HDEL', keys.cost, rid)
  redis.call('HDEL', keys.nreq, rid, total > 0 and rid or '*')
  if total > 0 then
    redis.call('HSET', keys.nreq, '*', format('%d', total))
  end
  return true
end
