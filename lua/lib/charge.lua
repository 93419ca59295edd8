-- charge(book, rid, requests, cost): change what is outstanding on `rid` by `requests` and `cost`,
-- and its score among those that can be chosen. `settle` writes it. No total falls below zero, and
-- a replica without requests holds no cost.
--@include lib/whole
--@include lib/rates
--@include lib/score
local function charge(book, rid, requests, cost)
  local account = book.at[rid]
  local outstanding, costs = book.requests[account], book.costs[account]
  if not book.scores[account] then
    outstanding, costs = whole(outstanding, 0, 0, 1e9), whole(costs, 0, 0, 4e15)
    book.charged[#book.charged + 1] = account
  end
  outstanding, costs = outstanding + requests, costs + cost
  if outstanding <= 0 then
    outstanding, costs = 0, 0
  elseif costs < 0 then
    costs = 0
  end
  book.requests[account], book.costs[account] = outstanding, costs
  book.total = math.max(0, book.total + requests)
  local place = score(costs, outstanding, rates(book.weights[account], book.rates))
  book.scores[account] = place
  if book.places[account] then
    book.places[account] = place
  end
end
