-- seat(keys, argv, at): reserve for the operation at argv[at], a plain one; returns replica and cost, or
-- nil and !BUSY or !NONE. The lowest score wins, ties by the caller's random number, or a candidate.
--@include lib/whole
--@include lib/post
--@include lib/sooner
local function seat(keys, argv, at)
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
    local place = string.format('%d', whole(argv[at + 3], 0, 0, 1e9) % ties)
    rid = redis.call('ZRANGE', keys.ready, place, place)[1]
  end
  local chosen, cost = sooner(keys, argv, at, rid, tonumber(least))
  if tonumber(least) >= 4e15 or not post(keys, chosen, nil, cost, cap) then
    return nil, '!BUSY'
  end
  return chosen, cost
end
