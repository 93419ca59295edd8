-- digits(number): a whole number as text with all its digits (tostring turns 1.7e15 into 1.7e+15).
local function digits(number)
  return string.format('%d', number)
end
