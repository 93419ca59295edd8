-- page(keys, book, size): read the next `size` replicas of `ready` into the book, from the lowest
-- score on; false if all have been read. Whoever has not been read has a score of at least
-- `book.limit`, because nothing is written before the end.
--@include lib/accounts
local function page(keys, book, size)
  if not book.limit then
    return false
  end
  local last = string.format('%d', book.rank + size - 1)
  local found = redis.call('ZRANGE', keys.ready, string.format('%d', book.rank), last, 'WITHSCORES')
  local rids, places = {}, {}
  for index = 1, #found, 2 do
    if not book.accounts[found[index]] then
      rids[#rids + 1], places[#places + 1] = found[index], found[index + 1]
    end
  end
  accounts(keys, book, rids, places)
  book.rank = book.rank + size
  book.limit = #found == 2 * size and tonumber(found[#found])
  return true
end
