-- choose(keys, operation, absolute, relative): the replica for one reservation, or !BUSY or !NONE.
-- The lowest score wins, ties by the caller's random number. An affinity candidate that is not full
-- wins where the request would be worked off sooner: its score, and the request's cost there at its
-- throughput, are at most what they are on the replica of the lowest score, with
-- max(lowest + absolute, lowest × relative) for that score (absolute is one too). Of several, the
-- soonest.
--@include lib/token_score
local function choose(keys, operation, absolute, relative)
  local ready, excluded, tries = keys.ready, operation.excluded, operation.tries
  local lowest = redis.call('ZRANGE', ready, '0', string.format('%d', tries), 'WITHSCORES')
  local first, idlest
  for index = 1, #lowest, 2 do
    if not excluded[lowest[index]] then
      idlest, first = lowest[index], lowest[index + 1]
      break
    end
  end
  if not first then
    return '!NONE'
  elseif tonumber(first) >= 4e15 then
    return '!BUSY'
  end
  if #operation.affinity > 0 then
    local bound = math.max(tonumber(first) + absolute, tonumber(first) * relative)
    local least = bound + operation.cost * token_score(keys.weight, idlest)
    local best
    for _, rid in ipairs(operation.affinity) do
      local place = not excluded[rid] and tonumber(redis.call('ZSCORE', ready, rid) or nil)
      if place and place < 4e15 then
        local done = place + operation.costs[rid] * token_score(keys.weight, rid)
        if done < least or done == least and not best then
          best, least = rid, done
        end
      end
    end
    if best then
      return best
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
