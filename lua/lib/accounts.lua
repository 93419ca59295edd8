-- accounts(keys, book, rids, places): read what is outstanding on `rids` into the book. `places` are
-- their scores in `ready`; who has none can be charged, and not chosen.
local function accounts(keys, book, rids, places)
  if #rids == 0 then
    return
  end
  local requests = redis.call('HMGET', keys.nreq, unpack(rids))
  local costs = redis.call('HMGET', keys.cost, unpack(rids))
  local weights = redis.call('HMGET', keys.weight, unpack(rids))
  for index, rid in ipairs(rids) do
    local account = { requests = requests[index], cost = costs[index], weight = weights[index] }
    if places[index] then
      account.at = #book.places + 1
      book.places[account.at], book.names[account.at] = tonumber(places[index]), rid
    end
    book.accounts[rid] = account
  end
end
