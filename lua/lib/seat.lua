-- seat(keys, random, price): reserve on the replica with the lowest score, of several on the one that
-- the random number names; returns it, or nil and !BUSY or !NONE.
--@include lib/whole
--@include lib/post
local function seat(keys, random, price)
  local cap = whole(redis.call('HGET', keys.spec, 'max_requests'), 1e9, 0, 1e9)
  local found = redis.call('ZRANGE', keys.ready, '0', '1', 'WITHSCORES')
  local rid, least = found[1], found[2]
  if not rid then
    -- A write that changes nothing: costs have not been read, and may be something else.
    redis.call('HDEL', keys.cost, '')
    local total = whole(redis.call('HGET', keys.nreq, '*'), 0, 0, 1e9)
    return nil, total < cap and '!NONE' or '!BUSY'
  elseif least == found[4] then
    local ties = redis.call('ZCOUNT', keys.ready, least, least)
    local place = string.format('%d', whole(random, 0, 0, 1e9) % ties)
    rid = redis.call('ZRANGE', keys.ready, place, place)[1]
  end
  if tonumber(least) >= 4e15 or not post(keys, rid, nil, price, cap) then
    return nil, '!BUSY'
  end
  return rid
end
