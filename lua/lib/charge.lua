-- charge(book, rid, requests, cost): change what is outstanding on `rid` by `requests` and `cost`,
-- and its place among those that can be chosen. `settle` writes it. No total falls below zero, and
-- a replica without requests holds no cost.
--@include lib/whole
--@include lib/rates
--@include lib/score
local function charge(book, rid, requests, cost)
  local account = book.accounts[rid]
  if not account.place then
    account.requests = whole(account.requests, 0, 0, 1e9)
    account.cost = whole(account.cost, 0, 0, 4e15)
    book.charged[#book.charged + 1] = rid
  end
  account.requests = math.max(0, account.requests + requests)
  account.cost = account.requests > 0 and math.max(0, account.cost + cost) or 0
  book.total = math.max(0, book.total + requests)
  account.place = score(account.cost, account.requests, rates(account.weight, book.rates))
  if account.at then
    book.places[account.at] = account.place
  end
end
