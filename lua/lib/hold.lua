-- hold(lease, batch, before, held): write what the requests of a batch hold now, request → "rid
-- cost" or false, where it differs from `before`; tell whether anything is held that was not.
local function hold(lease, batch, before, held)
  local set, gone = {}, {}
  for index = 1, #batch do
    local request = batch[index].request
    local text = held[request]
    -- The same request may come again: its first time settles it.
    held[request] = nil
    if text and text ~= before[index] then
      set[#set + 1] = request
      set[#set + 1] = text
    elseif text == false and before[index] then
      gone[#gone + 1] = request
    end
  end
  if #set > 0 then
    redis.call('HSET', lease, unpack(set))
  end
  if #gone > 0 then
    redis.call('HDEL', lease, unpack(gone))
  end
  return #set > 0
end
