-- apply(batch, book, holding, choose, reply): carry the operations of a batch out on its books, in
-- order, and put each one's result into `reply`.
local function apply(batch, book, holding, choose, reply)
  local names, at, charge = book.names, book.at, book.charge
  local verbs, costs, rids = batch.verbs, batch.costs, batch.rids
  local excluded, there = batch.excluded, batch.there
  local on, held, again, moved = holding.on, holding.held, holding.again, holding.moved
  for index = 1, batch.count do
    local verb, first, price = verbs[index], again[index] or index, costs[index]
    local account, answer, target = on[first], 0, false
    if verb == 'A' and account and not (excluded[index] and excluded[index][names[account]]) then
      answer = names[account]
    elseif verb ~= 'D' or not account or names[account] ~= rids[index] or held[first] ~= price then
      if account then
        charge(account, -1, -held[first])
      end
      if verb == 'D' then
        target, answer = at[rids[index]], 1
      elseif verb == 'R' then
        answer = (account or holding.before[first] and not moved[first]) and 1 or 0
      else
        target, answer = choose(index)
        if target then
          answer = names[target]
          price = there[index] and there[index][answer] or price
        end
      end
      if target then
        charge(target, 1, price)
      end
      on[first], held[first], moved[first] = target, price, true
    end
    reply[index + 1] = answer
  end
end
