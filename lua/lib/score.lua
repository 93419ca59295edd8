-- score(cost, requests, rate): the place of a replica in `ready`, always computed from integers.
-- cost × inverse throughput + penalty, held below 4e15; + 4e15 once it is at its request cap.
local function score(cost, requests, rate)
  local load = cost * rate.inverse + rate.penalty
  if load >= 4e15 then
    load = 4e15 - 1
  end
  if requests >= rate.cap then
    load = load + 4e15
  end
  return load
end
