-- charge(keys, book, rid, requests, cost): change what is outstanding on `rid` by `requests` and
-- `cost`, and its place in `ready` at once. `book` holds the totals until `settle` writes them.
-- No total falls below zero, and a replica without requests holds no cost.
--@include lib/whole
--@include lib/digits
--@include lib/score
local function charge(keys, book, rid, requests, cost)
  local account = book.accounts[rid]
  if not account then
    account = {
      requests = whole(redis.call('HGET', keys.nreq, rid), 0, 0, 1e9),
      cost = whole(redis.call('HGET', keys.cost, rid), 0, 0, 4e15),
      weight = redis.call('HGET', keys.weight, rid),
    }
    book.accounts[rid] = account
  end
  account.requests = math.max(0, account.requests + requests)
  account.cost = account.requests > 0 and math.max(0, account.cost + cost) or 0
  book.total = math.max(0, book.total + requests)
  local place = score(account.cost, account.requests, account.weight)
  redis.call('ZADD', keys.ready, 'XX', digits(place), rid)
end
