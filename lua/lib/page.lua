-- page(keys, book, size): read the next `size` replicas of `ready` into the book; false if all have
-- been read. Whoever has not been read has a score of at least `book.limit`, because nothing is
-- written before the end of the batch.
--@include lib/accounts
local function page(keys, book, size)
  if not book.limit then
    return false
  end
  local last = string.format('%d', book.rank + size - 1)
  local found = redis.call('ZRANGE', keys.ready, string.format('%d', book.rank), last, 'WITHSCORES')
  local rids = {}
  for index = 1, #found, 2 do
    if not book.at[found[index]] then
      local account = #book.names + #rids + 1
      rids[#rids + 1] = found[index]
      book.places[account] = tonumber(found[index + 1])
      book.fresh[#book.fresh + 1] = account
    end
  end
  accounts(keys, book, rids)
  book.rank = book.rank + size
  book.limit = #found == 2 * size and tonumber(found[#found])
  return true
end
