-- score(cost, requests, weight): the place of a replica in `ready`, always computed from integers.
-- cost × inverse throughput + penalty, held below 4e15; + 4e15 once it is at its request cap.
--@include lib/whole
local function score(cost, requests, weight)
  local inverse, cap, penalty = string.match(weight or '', '^(%d+) (%d+) (%d+)$')
  local load = cost * whole(inverse, 1000, 1, 1e6) + whole(penalty, 0, 0, 1e12)
  load = math.min(load, 4e15 - 1)
  if requests >= whole(cap, 256, 0, 1e9) then
    load = load + 4e15
  end
  return load
end
