-- opened(keys, batch, held): the book of a batch: every replica that it names, and, if it reserves,
-- as many of the lowest scores as it needs, with what is outstanding on them. Of equally idle
-- replicas that are more than that, a part that begins anywhere, so that each may be chosen.
--@include lib/blank
--@include lib/lease_of
--@include lib/accounts
local function opened(keys, batch, held)
  local book, rids, seen, reserves, random = blank(keys), {}, {}, 0, 0
  local function name(rid)
    if rid and not seen[rid] then
      seen[rid] = true
      rids[#rids + 1] = rid
    end
  end
  for _, operation in ipairs(batch) do
    local mine = held[operation.request]
    name(mine and lease_of(mine))
    name(operation.rid)
    if operation.verb == 'A' then
      reserves, random = reserves + 1 + operation.tries, random + operation.random
      for _, rid in ipairs(operation.affinity) do
        name(rid)
      end
    end
  end
  if reserves > 0 then
    local places = #rids > 0 and redis.call('ZMSCORE', keys.ready, unpack(rids)) or {}
    for account = 1, #places do
      book.places[account] = places[account] and tonumber(places[account])
      book.loose[account] = account
    end
    local size = math.min(80, reserves)
    local first = redis.call('ZRANGE', keys.ready, '0', '0', 'WITHSCORES')[2]
    local ties = first and redis.call('ZCOUNT', keys.ready, first, first) or 0
    local from = ties > size and random % ties or 0
    local to = ties > size and math.min(ties, from + size) or size
    local found = redis.call('ZRANGE', keys.ready, string.format('%d', from),
      string.format('%d', to - 1), 'WITHSCORES')
    for index = 1, #found, 2 do
      local rid = found[index]
      if not seen[rid] then
        rids[#rids + 1] = rid
        book.places[#rids] = tonumber(found[index + 1])
        book.fresh[#book.fresh + 1] = #rids
      end
    end
    if ties > size then
      book.spread, book.limit = true, tonumber(first)
    else
      book.rank, book.limit = size, #found == 2 * size and tonumber(found[#found])
    end
  end
  accounts(keys, book, rids)
  return book
end
