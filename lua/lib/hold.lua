-- hold(lease, before, held): write what requests hold now, request → "rid cost" or false, where it
-- differs from `before`; tell whether anything is held that was not.
local function hold(lease, before, held)
  local set, gone = {}, {}
  for request, text in pairs(held) do
    if text ~= before[request] then
      if text then
        set[#set + 1] = request
        set[#set + 1] = text
      else
        gone[#gone + 1] = request
      end
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
