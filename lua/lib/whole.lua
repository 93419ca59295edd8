-- whole(text, default, low, high): `text` as a whole number within [low, high], `default` if it is
-- no number. Infinities end at the bounds; fractions are cut off.
local function whole(text, default, low, high)
  local number = tonumber(text)
  if not number or number ~= number then
    return default
  elseif number <= low then
    return low
  elseif number >= high then
    return high
  end
  return number - number % 1
end
