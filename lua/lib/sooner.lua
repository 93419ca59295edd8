-- sooner(keys, argv, at, idlest, lowest): where the reserve at argv[at] is worked off soonest, the
-- replica `idlest` with the lowest score or one of its candidates, and what it costs there. A
-- candidate is not full, and its score, and the cost there at its throughput, are at most
-- max(lowest + absolute, lowest × relative) and the cost on `idlest`.
--@include lib/whole
--@include lib/rates
local function sooner(keys, argv, at, idlest, lowest)
  local cost, rids, prices, known = whole(argv[at + 2], 1, 0, 1e9), {}, {}, {}
  for index = 1, tonumber(argv[at + 4]) do
    local rid = argv[at + 4 + 2 * index]
    rids[index], prices[rid] = rid, whole(argv[at + 5 + 2 * index], 1, 0, 1e9)
  end
  if #rids == 0 then
    return idlest, cost
  end
  local limits = redis.call('HMGET', keys.spec, 'affinity_absolute', 'affinity_relative')
  local absolute = whole(limits[1], 0, 0, 1e9) * 1000
  local relative = math.max(1, math.min(1000, tonumber(limits[2]) or 1))
  local places = redis.call('ZMSCORE', keys.ready, unpack(rids))
  local weights = redis.call('HMGET', keys.weight, idlest, unpack(rids))
  local best = nil
  local least = math.max(lowest + absolute, lowest * relative) + cost * rates(weights[1], known).inverse
  for index = 1, #rids do
    local place = tonumber(places[index] or nil)
    if place and place < 4e15 then
      local done = place + prices[rids[index]] * rates(weights[index + 1], known).inverse
      if done < least or done == least and not best then
        best, least = rids[index], done
      end
    end
  end
  best = best or idlest
  return best, prices[best] or cost
end
