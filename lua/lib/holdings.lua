-- holdings(lease, batch): what the requests of a batch hold, request → "rid cost", or false; twice,
-- because one of them will change.
local function holdings(lease, batch)
  local before, held, requests = {}, {}, {}
  for index, operation in ipairs(batch) do
    requests[index] = operation.request
  end
  local found = #requests > 0 and redis.call('HMGET', lease, unpack(requests)) or {}
  for index, request in ipairs(requests) do
    before[request], held[request] = found[index], found[index]
  end
  return before, held
end
