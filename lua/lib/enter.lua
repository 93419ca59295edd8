-- enter(keys, rid, record, channel): store a record as a new version of the routes, give the
-- replica its place in `ready` (READY only) and its weight, and publish the hint. Returns the
-- version.
--@include lib/whole
--@include lib/digits
--@include lib/rates
--@include lib/score
--@include lib/next_version
--@include lib/now_ms
local function enter(keys, rid, record, channel)
  local previous = redis.call('GET', keys.ver) or '0'
  local ver = next_version(previous, now_ms())
  record.ver = ver
  local capacity = tonumber(record.capacity) or 1
  local inverse = capacity > 0 and 1000 / capacity + 0.5 or 1000
  local weight = string.format('%d %d %.0f', whole(inverse, 1000, 1, 1e6),
    whole(record.max_requests, 256, 0, 1e9), whole(record.penalty, 0, 0, 1e12))
  local json = cjson.encode(record)
  redis.call('SET', keys.ver, digits(ver))
  redis.call('HSET', keys.replicas, rid, json)
  redis.call('HSET', keys.weight, rid, weight)
  if record.state == 'READY' then
    local cost = whole(redis.call('HGET', keys.cost, rid), 0, 0, 4e15)
    local requests = whole(redis.call('HGET', keys.nreq, rid), 0, 0, 1e9)
    redis.call('ZADD', keys.ready, digits(score(cost, requests, rates(weight, {}))), rid)
  else
    redis.call('ZREM', keys.ready, rid)
  end
  redis.call('PUBLISH', channel, previous .. ' ' .. digits(ver) .. ' ' .. rid .. ' ' .. json)
  return digits(ver)
end
