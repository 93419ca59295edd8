-- prefer(book, batch, index, bound, idlest): the account of the affinity candidate where a request
-- is worked off soonest, or nil. It is not full, and its score, and the request's cost there at its
-- throughput, are at most `bound`, a score, and the request's cost on the account `idlest`.
local function prefer(book, batch, index, bound, idlest)
  local there, excluded = batch.there[index], batch.excluded[index]
  local least = bound + batch.costs[index] * book.rated(idlest).inverse
  local best
  for _, rid in ipairs(batch.affinity[index]) do
    local account = not (excluded and excluded[rid]) and book.at[rid]
    local place = account and book.places[account]
    if place and place < 4e15 then
      local done = place + there[rid] * book.rated(account).inverse
      if done < least or done == least and not best then
        best, least = account, done
      end
    end
  end
  return best
end
