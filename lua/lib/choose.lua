-- choose(keys, book, operation, absolute, relative): the replica for one reservation, or !BUSY or
-- !NONE. The lowest score wins, ties by the caller's random number. An affinity candidate that is
-- not full wins where the request would be worked off sooner: its score, and the request's cost
-- there at its throughput, are at most what they are on a replica of the lowest score, with
-- max(lowest + absolute, lowest × relative) for that score (absolute is one too). Of several, the
-- soonest.
--@include lib/page
--@include lib/rates
local function choose(keys, book, operation, absolute, relative)
  local excluded, places, names, ties = operation.excluded, book.places, book.names, book.ties
  local lowest, count
  repeat
    lowest, count = math.huge, 0
    for index = 1, #places do
      local place = places[index]
      if place <= lowest and not excluded[names[index]] then
        if place < lowest then
          lowest, count = place, 0
        end
        count = count + 1
        ties[count] = index
      end
    end
  until book.limit and lowest <= book.limit or not page(keys, book, 64)
  if count == 0 then
    return '!NONE'
  elseif lowest >= 4e15 then
    return '!BUSY'
  end
  local idlest = names[ties[operation.random % count + 1]]
  if #operation.affinity > 0 then
    local function token_score(rid)
      return rates(book.accounts[rid].weight, book.rates).inverse
    end
    local bound = math.max(lowest + absolute, lowest * relative)
    local least = bound + operation.cost * token_score(idlest)
    local best
    for _, rid in ipairs(operation.affinity) do
      local account = not excluded[rid] and book.accounts[rid]
      local place = account and account.at and places[account.at]
      if place and place < 4e15 then
        local done = place + operation.costs[rid] * token_score(rid)
        if done < least or done == least and not best then
          best, least = rid, done
        end
      end
    end
    return best or idlest
  end
  return idlest
end
