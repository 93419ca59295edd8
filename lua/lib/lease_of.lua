-- lease_of(text): replica id and cost of a stored reservation, or nil if there is none to read.
local function lease_of(text)
  if text then
    local rid, cost = string.match(text, '^(%S+) (%d+)$')
    return rid, tonumber(cost)
  end
end
