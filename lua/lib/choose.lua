-- choose(keys, book, operation, absolute, relative): the replica for one reservation, or !BUSY or
-- !NONE. The lowest score wins, ties by the caller's random number; an affinity candidate that is
-- not full wins while its score is at most max(lowest + absolute, lowest × relative).
--@include lib/page
local function choose(keys, book, operation, absolute, relative)
  local excluded, places, names, ties = operation.excluded, book.places, book.names, book.ties
  local lowest, count
  repeat
    lowest, count = math.huge, 0
    for index = 1, #places do
      local place = places[index]
      if place <= lowest and not excluded[names[index]] then
        if place < lowest then
          lowest, count = place, 0
        end
        count = count + 1
        ties[count] = index
      end
    end
  until book.limit and lowest <= book.limit or not page(keys, book, 64)
  if count == 0 then
    return '!NONE'
  elseif lowest >= 4e15 then
    return '!BUSY'
  end
  if #operation.affinity > 0 then
    local bound = math.max(lowest + absolute, lowest * relative)
    for _, rid in ipairs(operation.affinity) do
      local account = not excluded[rid] and book.accounts[rid]
      local place = account and account.at and places[account.at]
      if place and place < 4e15 and place <= bound then
        return rid
      end
    end
  end
  return names[ties[operation.random % count + 1]]
end
