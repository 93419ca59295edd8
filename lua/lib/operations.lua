-- operations(argv, first): the batch from argv[first] on as a list of tables, or nil and the number
-- of the argument that makes no sense. Costs are clamped to [0, 1e9]; what is no number costs 1.
-- `costs` holds what a reserve costs on each of its candidates.
--@include lib/whole
local function operations(argv, first)
  local list, at, none, last = {}, first, {}, #argv
  while at <= last do
    local verb, request = argv[at], argv[at + 1] or ''
    local operation
    if #request < 1 or #request > 200 then
      return nil, at + 1
    elseif verb == 'R' then
      operation = { verb = verb, request = request }
      at = at + 2
    elseif verb == 'D' then
      local rid = argv[at + 2] or ''
      operation = { verb = verb, request = request, rid = rid, cost = whole(argv[at + 3], 1, 0, 1e9) }
      if not string.find(rid, '^%w[%w%._:/@+-]*$') or #rid > 128 then
        return nil, at + 2
      end
      at = at + 4
    elseif verb == 'A' then
      local candidates = whole(argv[at + 4], -1, -1, 1e9)
      local tries = whole(argv[at + 5], -1, -1, 1e9)
      if candidates < 0 or candidates > 16 or tries < 0 or tries > 16 then
        return nil, at + 4
      end
      operation = {
        verb = verb,
        request = request,
        cost = whole(argv[at + 2], 1, 0, 1e9),
        random = whole(argv[at + 3], 0, 0, 1e9),
        tries = tries,
        affinity = candidates > 0 and {} or none,
        costs = candidates > 0 and {} or none,
        excluded = tries > 0 and {} or none,
      }
      for index = 1, candidates do
        local rid = argv[at + 4 + 2 * index] or ''
        operation.affinity[index] = rid
        operation.costs[rid] = whole(argv[at + 5 + 2 * index], 1, 0, 1e9)
      end
      for index = 1, tries do
        operation.excluded[argv[at + 5 + 2 * candidates + index] or ''] = true
      end
      at = at + 6 + 2 * candidates + tries
    else
      return nil, at
    end
    list[#list + 1] = operation
  end
  if at ~= last + 1 or #list > 64 then
    return nil, last
  end
  return list
end
