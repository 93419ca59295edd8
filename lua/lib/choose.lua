-- choose(ready, operation, absolute, relative): the replica for one reservation, or !BUSY or !NONE.
-- The lowest score wins, ties by the caller's random number; an affinity candidate that is not
-- full wins while its score is at most max(lowest + absolute, lowest × relative).
local function choose(ready, operation, absolute, relative)
  local excluded, tries = operation.excluded, operation.tries
  local lowest = redis.call('ZRANGE', ready, '0', string.format('%d', tries), 'WITHSCORES')
  local first
  for index = 1, #lowest, 2 do
    if not excluded[lowest[index]] then
      first = lowest[index + 1]
      break
    end
  end
  if not first then
    return '!NONE'
  elseif tonumber(first) >= 4e15 then
    return '!BUSY'
  end
  local bound = math.max(tonumber(first) + absolute, tonumber(first) * relative)
  for _, rid in ipairs(operation.affinity) do
    local place = not excluded[rid] and tonumber(redis.call('ZSCORE', ready, rid) or nil)
    if place and place < 4e15 and place <= bound then
      return rid
    end
  end
  local rank = redis.call('ZCOUNT', ready, '-inf', '(' .. first)
  local ties = redis.call('ZCOUNT', ready, first, first)
  local chosen
  for step = 0, tries do
    local at = string.format('%d', rank + (operation.random + step) % ties)
    chosen = redis.call('ZRANGE', ready, at, at)[1]
    if not excluded[chosen] then
      break
    end
  end
  return chosen
end
