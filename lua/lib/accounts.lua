-- accounts(keys, book, rids): read what is outstanding on `rids`, none of which the book knows, into
-- it. An account is a number: the same place in each of the book's lists.
local function accounts(keys, book, rids)
  if #rids == 0 then
    return
  end
  local requests = redis.call('HMGET', keys.nreq, unpack(rids))
  local costs = redis.call('HMGET', keys.cost, unpack(rids))
  local weights = redis.call('HMGET', keys.weight, unpack(rids))
  if #book.names == 0 then
    book.names, book.requests, book.costs, book.weights = rids, requests, costs, weights
  end
  local known = book.names == rids and 0 or #book.names
  for index = 1, #rids do
    local account = known + index
    book.at[rids[index]] = account
    if known > 0 then
      book.names[account], book.requests[account] = rids[index], requests[index]
      book.costs[account], book.weights[account] = costs[index], weights[index]
    end
  end
end
