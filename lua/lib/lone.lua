-- lone(keys, argv): the reply to a batch of one plain operation: a reserve that names no replicas, a
-- release, or an adoption by the replica that has the request. Else nil, and nothing was done. It
-- does what a larger batch would, without a batch's books: under light load most are such, and for
-- each reserve somebody waits.
--@include lib/whole
--@include lib/lease_of
--@include lib/head
--@include lib/post
--@include lib/now_ms
local function lone(keys, argv)
  local verb, request, size, price = argv[2], argv[3] or '', #argv, nil
  if verb == 'A' and size == 7 and argv[6] == '0' and argv[7] == '0' then
    price = whole(argv[4], 1, 0, 1e9)
  elseif verb == 'D' and size == 5 then
    price = whole(argv[5], 1, 0, 1e9)
  elseif verb ~= 'R' or size ~= 3 then
    return nil
  end
  local text = #request > 0 and #request <= 200 and redis.call('HGET', keys.lease, request)
  local rid, tokens = lease_of(text)
  if text and not rid or verb == 'D' and rid ~= argv[4] then
    return nil
  end
  local version = redis.call('GET', keys.ver) or '0'
  if rid and verb == 'A' then
    return { version, rid }
  elseif verb ~= 'A' and (not rid or tokens == price) then
    return { version, 0 }
  end
  local known, cap, least = true, math.huge, 0
  if verb == 'A' then
    known = redis.call('ZSCORE', keys.px, argv[1])
    cap = whole(redis.call('HGET', keys.spec, 'max_requests'), 1e9, 0, 1e9)
    rid, least = head(keys.ready, whole(argv[5], 0, 0, 1e9))
    if not rid then
      return nil
    end
  end
  if tonumber(least) >= 4e15 or not post(keys, rid, tokens, price, cap) then
    return { version, '!BUSY' }
  end
  if not price then
    redis.call('HDEL', keys.lease, request)
    return { version, 1 }
  end
  redis.call('HSET', keys.lease, request, string.format('%s %d', rid, price))
  if not known then
    redis.call('ZADD', keys.px, string.format('%d', now_ms()), argv[1])
  end
  return { version, verb == 'A' and rid or 1 }
end
