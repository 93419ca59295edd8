-- hold(keys, batch, holding, names): write what the requests that `moved` hold now; tell whether they
-- hold anything.
local function hold(keys, batch, holding, names)
  local format, requests, before, moved = string.format, batch.requests, holding.before, holding.moved
  local on, held, set, gone, count = holding.on, holding.held, {}, {}, 0
  for index = 1, batch.count do
    local account = moved[index] and on[index]
    if account then
      set[count + 1], set[count + 2] = requests[index], format('%s %d', names[account], held[index])
      count = count + 2
    elseif moved[index] and before[index] then
      gone[#gone + 1] = requests[index]
    end
  end
  if count > 0 then
    redis.call('HSET', keys.lease, unpack(set))
  end
  if #gone > 0 then
    redis.call('HDEL', keys.lease, unpack(gone))
  end
  return count > 0
end
