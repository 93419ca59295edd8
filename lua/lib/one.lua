-- one(keys, argv, at): carry out the operation at argv[at], a plain one; returns its result, and where
-- the next one begins.
--@include lib/whole
--@include lib/lease_of
--@include lib/post
--@include lib/seat
--@include lib/now_ms
local function one(keys, argv, at)
  local verb, request, wanted = argv[at], argv[at + 1], argv[at] ~= 'R' and argv[at + 2]
  local text = redis.call('HGET', keys.lease, request)
  local rid, tokens = lease_of(text)
  local result, after, price = 1, at + 2, nil
  if verb == 'A' then
    after, price = at + 6 + 2 * argv[at + 4], true
    if rid then
      return rid, after
    end
  elseif verb == 'D' then
    after, price = at + 4, whole(argv[at + 3], 1, 0, 1e9)
    if rid == wanted and tokens == price then
      return 0, after
    end
  elseif not text then
    return 0, after
  end
  local known = not price or redis.call('ZSCORE', keys.px, argv[1])
  if verb == 'A' then
    wanted, price = seat(keys, argv, at)
    result = wanted or price
  elseif rid == wanted then
    post(keys, rid, tokens, price)
  else
    if rid then
      post(keys, rid, tokens)
    end
    if price then
      post(keys, wanted, nil, price)
    end
  end
  if not price or not wanted then
    redis.call('HDEL', keys.lease, request)
  else
    redis.call('HSET', keys.lease, request, string.format('%s %d', wanted, price))
    if not known then
      redis.call('ZADD', keys.px, string.format('%d', now_ms()), argv[1])
    end
  end
  return result, after
end
