-- operations(argv, first): the batch from argv[first] on, as lists with a place for each operation,
-- or nil and the number of the argument that makes no sense. Costs are clamped to [0, 1e9]; what is
-- no number costs 1. `affinity` (a list), `there` (what it costs on each of them) and `excluded` (a
-- set) are there only for those reserves that name any; `asks` is the first reserve, `holds` whether
-- anything may be held after the batch, and random(index) a reserve's number, which few need.
--@include lib/whole
local function operations(argv, first)
  local verbs, requests, costs, begins = {}, {}, {}, {}
  local rids, affinity, there, excluded = {}, {}, {}, {}
  local at, last, count, reserves, tries, adopts, asks = first, #argv, 0, 0, 0, 0, nil
  while at <= last do
    local verb, request = argv[at], argv[at + 1] or ''
    local length, cost = #request, 0
    count = count + 1
    begins[count] = at
    if length < 1 or length > 200 then
      return nil, at + 1
    elseif verb == 'R' then
      at = at + 2
    elseif verb == 'A' then
      local candidates, exclusions = argv[at + 4], argv[at + 5]
      cost = whole(argv[at + 2], 1, 0, 1e9)
      reserves, asks, at = reserves + 1, asks or count, at + 6
      if candidates ~= '0' or exclusions ~= '0' then
        candidates, exclusions = whole(candidates, -1, -1, 1e9), whole(exclusions, -1, -1, 1e9)
        if candidates < 0 or candidates > 16 or exclusions < 0 or exclusions > 16 then
          return nil, at - 2
        end
        local list, prices, set = {}, {}, {}
        for index = 1, candidates do
          local rid = argv[at] or ''
          list[index], prices[rid] = rid, whole(argv[at + 1], 1, 0, 1e9)
          at = at + 2
        end
        for index = at, at + exclusions - 1 do
          set[argv[index] or ''] = true
        end
        affinity[count], there[count] = candidates > 0 and list or nil, prices
        excluded[count], at = exclusions > 0 and set or nil, at + exclusions
        tries = tries + exclusions
      end
    elseif verb == 'D' then
      local rid = argv[at + 2] or ''
      if not string.find(rid, '^%w[%w%._:/@+-]*$') or #rid > 128 then
        return nil, at + 2
      end
      rids[count], cost = rid, whole(argv[at + 3], 1, 0, 1e9)
      at, adopts = at + 4, adopts + 1
    else
      return nil, at
    end
    verbs[count], requests[count], costs[count] = verb, request, cost
  end
  if at ~= last + 1 or count > 64 then
    return nil, last
  end
  return {
    count = count, verbs = verbs, requests = requests, costs = costs, rids = rids,
    affinity = affinity, there = there, excluded = excluded,
    reserves = reserves, tries = tries, asks = asks, holds = reserves + adopts > 0,
    random = function(index) return whole(argv[begins[index] + 3], 0, 0, 1e9) end,
  }
end
