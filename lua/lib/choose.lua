-- choose(keys, book, operation, absolute, relative): the replica for one reservation, or !BUSY or
-- !NONE. The lowest score wins, ties by the caller's random number; an affinity candidate wins where
-- the request would be worked off sooner, with max(lowest + absolute, lowest × relative) for the
-- lowest score.
--@include lib/page
--@include lib/prefer
local function choose(keys, book, operation, absolute, relative)
  local excluded, places, names = operation.excluded, book.places, book.names
  local loose, fresh, ties = book.loose, book.fresh, book.ties
  local lowest, count, from = math.huge, 0, 1
  for index = 1, #loose do
    local account = loose[index]
    local place = places[account]
    if place and place <= lowest and not excluded[names[account]] then
      count = place < lowest and 1 or count + 1
      lowest, ties[count] = place, account
    end
  end
  local known = count
  repeat
    while fresh[from] and excluded[names[fresh[from]]] do
      from = from + 1
    end
  until fresh[from] or book.limit and lowest <= book.limit or not page(keys, book, 64)
  if fresh[from] and places[fresh[from]] < lowest then
    lowest, count, known = places[fresh[from]], 0, 0
  end
  local at = from
  while fresh[at] and places[fresh[at]] == lowest and not (book.spread and at > from) do
    if not excluded[names[fresh[at]]] then
      count = count + 1
      ties[count] = fresh[at]
    end
    at = at + 1
  end
  if count == 0 then
    return '!NONE'
  elseif lowest >= 4e15 then
    return '!BUSY'
  end
  local number = operation.random % count + 1
  local idlest = ties[number]
  if #operation.affinity > 0 then
    local best = prefer(book, operation, math.max(lowest + absolute, lowest * relative), idlest)
    if best then
      return best
    end
  end
  if number > known then
    while fresh[from] ~= idlest do
      from = from + 1
    end
    loose[#loose + 1] = table.remove(fresh, from)
  end
  return names[idlest]
end
