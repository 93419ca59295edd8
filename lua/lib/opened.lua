-- opened(keys, batch, held): the book of a batch: every replica that it names, and, if it reserves,
-- as many of the lowest scores as it may need, with what is outstanding on them. Of equally idle
-- replicas that are more than that, a part that begins anywhere, so that each may be chosen.
--@include lib/whole
--@include lib/lease_of
--@include lib/accounts
--@include lib/page
local function opened(keys, batch, held)
  local book = {
    accounts = {}, places = {}, names = {}, ties = {}, charged = {}, rates = {}, rank = 0, limit = 0,
    total = whole(redis.call('HGET', keys.nreq, '*'), 0, 0, 1e9),
  }
  local rids, seen, reserves, random = {}, {}, 0, 0
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
    for _, rid in ipairs(operation.affinity) do
      name(rid)
    end
    if operation.verb == 'A' then
      reserves, random = reserves + 1 + operation.tries, random + operation.random
    end
  end
  local places = {}
  if #rids > 0 and reserves > 0 then
    places = redis.call('ZMSCORE', keys.ready, unpack(rids))
  end
  accounts(keys, book, rids, places)
  if reserves > 0 then
    local size = math.min(80, reserves)
    local first = redis.call('ZRANGE', keys.ready, '0', '0', 'WITHSCORES')[2]
    local ties = first and redis.call('ZCOUNT', keys.ready, first, first) or 0
    if ties > size then
      book.rank = random % ties
    end
    page(keys, book, size)
    if ties > size then
      book.rank, book.limit = 0, tonumber(first)
    end
  end
  return book
end
