-- whole(text, default, low, high): `text` as a whole number within [low, high], `default` if it is
-- no number. Infinities end at the bounds; fractions are cut off.
local function whole(text, default, low, high)
  local number = tonumber(text)
  if not number or number ~= number then
    return default
  end
  return math.floor(math.max(low, math.min(high, number)))
end
