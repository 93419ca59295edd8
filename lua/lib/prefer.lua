-- prefer(book, operation, bound, idlest): the affinity candidate where a request is worked off
-- soonest, or nil. It is not full, and its score, and the request's cost there at its throughput,
-- are at most `bound`, a score, and the request's cost on the account `idlest`.
--@include lib/rates
local function prefer(book, operation, bound, idlest)
  local least = bound + operation.cost * rates(book.weights[idlest], book.rates).inverse
  local best
  for _, rid in ipairs(operation.affinity) do
    local account = not operation.excluded[rid] and book.at[rid]
    local place = account and book.places[account]
    if place and place < 4e15 then
      local inverse = rates(book.weights[account], book.rates).inverse
      local done = place + operation.costs[rid] * inverse
      if done < least or done == least and not best then
        best, least = rid, done
      end
    end
  end
  return best
end
