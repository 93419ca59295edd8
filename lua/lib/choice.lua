-- choice(keys, book, batch): how a batch chooses replicas: choose(index), below. Reads of `ready` what
-- the batch will probably need. Candidates are of two kinds: `loose` ones, which the batch names or
-- has charged, in any order, and `fresh` ones, which were not charged since they were read, in the
-- order of scores. Whoever has not been read has a score of at least `limit`, because nothing is
-- written before the end of the batch. Of the loose ones the least score, and who has it, is known
-- as long as those do not change: a search for each choice would cost more than all the rest.
--@include lib/whole
--@include lib/prefer
local function choice(keys, book, batch)
  local names, at, places, touched = book.names, book.at, book.places, book.touched
  local exclusions, affinity, full = batch.excluded, batch.affinity, book.full
  local loose, fresh, next, alike, spread, rank, limit = {}, {}, 1, 0, false, 0, nil
  -- The least score of a loose one and the `tied` first of `ties`, which had it; the last one has it.
  local lowest, ties, tied, noted, stale = math.huge, {}, 0, 0, true

  local limits = redis.call('HMGET', keys.spec, 'max_requests', 'affinity_absolute', 'affinity_relative')
  local max_requests = whole(limits[1], 1e9, 0, 1e9)
  local absolute = whole(limits[2], 0, 0, 1e9) * 1000
  local relative = math.max(1, math.min(1000, tonumber(limits[3]) or 1))

  -- add(found): put replicas and their scores, in order, among the fresh ones.
  local function add(found)
    local count = #names
    for index = 1, #found, 2 do
      local rid = found[index]
      if not at[rid] then
        count = count + 1
        names[count], at[rid], places[count] = rid, count, tonumber(found[index + 1])
        fresh[#fresh + 1] = count
      end
    end
  end

  -- page(): read the next replicas of `ready`; false if all have been read.
  local function page()
    if not limit then
      return false
    end
    local first, size = #names + 1, 64
    local found = redis.call('ZRANGE', keys.ready, string.format('%d', rank),
      string.format('%d', rank + size - 1), 'WITHSCORES')
    add(found)
    if #names >= first then
      book.read(first)
    end
    rank, limit = rank + size, #found == 2 * size and tonumber(found[#found]) or nil
    return true
  end

  -- admitted(from, excluded): the first of the fresh ones, from `from` on, that is not excluded.
  local function admitted(from, excluded)
    while excluded and fresh[from] and excluded[names[fresh[from]]] do
      from = from + 1
    end
    return from
  end

  -- run(from, place): the last of the fresh ones from `from` on that have the same score.
  local function run(from, place)
    local last = from > alike and from or alike
    while not spread and places[fresh[last + 1]] == place do
      last = last + 1
    end
    return last
  end

  -- compare(excluded): make `lowest` and `ties` true, for a request that excludes some.
  local function compare(excluded)
    for index = noted + 1, #touched do
      local account = touched[index]
      local place = places[account]
      if place < lowest then
        lowest, tied, ties[1] = place, 1, account
      elseif place == lowest then
        tied = tied + 1
        ties[tied] = account
      end
    end
    noted = #touched
    while tied > 0 and (excluded or stale or places[ties[tied]] ~= lowest) do
      tied = tied - 1
    end
    if tied == 0 then
      local all, scores, least = loose, places, math.huge
      for index = 1, #all do
        local account = all[index]
        local place = scores[account]
        if place <= least and not (excluded and excluded[names[account]]) then
          tied = place < least and 1 or tied + 1
          least, ties[tied] = place, account
        end
      end
      lowest = least
    end
    stale = excluded ~= nil
  end

  -- take(pick, from): one of those from `from` on that have the same score is not fresh any more. Those
  -- before `from` are excluded by this request only.
  local function take(pick, from)
    loose[#loose + 1] = fresh[pick]
    fresh[pick] = fresh[from]
    for index = from, next + 1, -1 do
      fresh[index] = fresh[index - 1]
    end
    next = next + 1
  end

  -- choose(index): the account for a reserve, which must be charged next, or nil and !BUSY or !NONE.
  -- The lowest score wins, ties by the caller's random number; an affinity candidate wins where the
  -- request would be worked off sooner, with max(lowest + absolute, lowest × relative) for the lowest
  -- score.
  local function choose(index)
    if full(max_requests) then
      return nil, '!BUSY'
    end
    local excluded = exclusions[index]
    compare(excluded)
    local from = excluded and admitted(next, excluded) or next
    while not fresh[from] and not (limit and lowest <= limit) and page() do
      from = admitted(from, excluded)
    end
    local least, count, last, same = lowest, tied, 0, 0
    local place = fresh[from] and places[fresh[from]]
    if place and place <= least then
      count = place == least and count or 0
      least, last = place, run(from, place)
      alike, same = excluded and alike or last, last - from + 1
    end
    if count + same == 0 then
      return nil, '!NONE'
    elseif least >= 4e15 then
      return nil, '!BUSY'
    end
    local number = count + same > 1 and batch.random(index) % (count + same) + 1 or 1
    local pick = from + number - count - 1
    if number > count and excluded then
      pick = admitted(pick, excluded)
      pick = pick > last and from or pick
    end
    local account = fresh[pick]
    if number <= count then
      account = places[ties[number]] == least and ties[number] or ties[count]
    end
    if affinity[index] then
      local bound = math.max(least + absolute, least * relative)
      local best = prefer(book, batch, index, bound, account)
      if best then
        return best
      end
    end
    if number > count then
      take(pick, from)
    end
    return account
  end

  -- The scores of the accounts that the book has, and as many of the lowest as the batch needs. Of
  -- more equally idle replicas, a part that begins anywhere, so that each may be chosen.
  do
    local named, size = #names, math.min(80, batch.reserves + batch.tries)
    if named > 0 then
      local found = redis.call('ZMSCORE', keys.ready, unpack(names))
      for account = 1, named do
        if found[account] then
          places[account], loose[#loose + 1] = tonumber(found[account]), account
        end
      end
    end
    local first = redis.call('ZRANGE', keys.ready, '0', '0', 'WITHSCORES')[2]
    local all = first and redis.call('ZCOUNT', keys.ready, first, first) or 0
    local found
    if all > size then
      local from = batch.random(batch.asks) % all
      local part = redis.call('ZRANGE', keys.ready, string.format('%d', from),
        string.format('%d', math.min(all, from + size) - 1))
      found = {}
      for index = 1, #part do
        found[2 * index - 1], found[2 * index] = part[index], first
      end
      spread, limit = true, tonumber(first)
    else
      found = redis.call('ZRANGE', keys.ready, '0', string.format('%d', size - 1), 'WITHSCORES')
      rank, limit = size, #found == 2 * size and tonumber(found[#found]) or nil
    end
    add(found)
  end

  return choose
end
