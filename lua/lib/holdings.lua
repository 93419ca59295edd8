-- holdings(keys, batch, book): what the requests of a batch hold, and accounts in the book for all
-- replicas that the batch names. For each request it stands at its first operation: `before`, what
-- the lease hash says; `on`, the account, if any; `held`, the cost; `moved`, whether the batch changed
-- it. `again` leads further operations of the same request there.
--@include lib/lease_of
local function holdings(keys, batch, book)
  local requests, rids, names, at = batch.requests, batch.rids, book.names, book.at
  local again, on, held, seen, count = {}, {}, {}, {}, 0
  local before = batch.count > 0 and redis.call('HMGET', keys.lease, unpack(requests)) or {}
  local function account_of(rid)
    local account = at[rid]
    if not account then
      count = count + 1
      account, names[count], at[rid] = count, rid, count
    end
    return account
  end
  for index = 1, batch.count do
    local request, text = requests[index], before[index]
    if seen[request] then
      again[index] = seen[request]
    else
      seen[request] = index
    end
    if text then
      local rid, cost = lease_of(text)
      on[index], held[index] = rid and account_of(rid), cost
    else
      on[index], held[index] = false, 0
    end
    if rids[index] then
      account_of(rids[index])
    end
  end
  for _, list in pairs(batch.affinity) do
    for _, rid in ipairs(list) do
      account_of(rid)
    end
  end
  return { before = before, on = on, held = held, again = again, moved = {} }
end
