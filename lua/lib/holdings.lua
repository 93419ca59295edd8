-- holdings(lease, batch): what the requests of a batch hold, "rid cost" or false: in the batch's
-- order, and by request.
local function holdings(lease, batch)
  local requests, held = {}, {}
  for index = 1, #batch do
    requests[index] = batch[index].request
  end
  local before = #requests > 0 and redis.call('HMGET', lease, unpack(requests)) or {}
  for index = 1, #requests do
    held[requests[index]] = before[index]
  end
  return before, held
end
