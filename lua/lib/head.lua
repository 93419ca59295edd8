-- head(ready, random): a replica with the lowest score, and the score as text; of several, the one
-- that the random number names. Nil if there is none.
local function head(ready, random)
  local found = redis.call('ZRANGE', ready, '0', '1', 'WITHSCORES')
  if found[2] and found[2] == found[4] then
    local ties = redis.call('ZCOUNT', ready, found[2], found[2])
    local place = string.format('%d', random % ties)
    return redis.call('ZRANGE', ready, place, place)[1], found[2]
  end
  return found[1], found[2]
end
