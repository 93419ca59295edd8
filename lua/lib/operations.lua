-- operations(argv, first): the batch from argv[first] on as a list of tables, or nil and the number
-- of the argument that makes no sense. Costs are clamped to [0, 1e9]; what is no number costs 1.
-- `costs` holds what a reserve costs on each of its candidates.
--@include lib/whole
local function operations(argv, first)
  local list, at = {}, first
  while at <= #argv do
    local verb, request = argv[at], argv[at + 1] or ''
    local operation =
      { verb = verb, request = request, affinity = {}, costs = {}, excluded = {} }
    if #request < 1 or #request > 200 then
      return nil, at + 1
    elseif verb == 'R' then
      at = at + 2
    elseif verb == 'D' then
      operation.rid = argv[at + 2] or ''
      operation.cost = whole(argv[at + 3], 1, 0, 1e9)
      if not string.find(operation.rid, '^%w[%w%._:/@+-]*$') or #operation.rid > 128 then
        return nil, at + 2
      end
      at = at + 4
    elseif verb == 'A' then
      operation.cost = whole(argv[at + 2], 1, 0, 1e9)
      operation.random = whole(argv[at + 3], 0, 0, 1e9)
      local candidates = whole(argv[at + 4], -1, -1, 1e9)
      operation.tries = whole(argv[at + 5], -1, -1, 1e9)
      if candidates < 0 or candidates > 16 or operation.tries < 0 or operation.tries > 16 then
        return nil, at + 4
      end
      for index = 1, candidates do
        local rid = argv[at + 4 + 2 * index] or ''
        operation.affinity[index] = rid
        operation.costs[rid] = whole(argv[at + 5 + 2 * index], 1, 0, 1e9)
      end
      for index = 1, operation.tries do
        operation.excluded[argv[at + 5 + 2 * candidates + index] or ''] = true
      end
      at = at + 6 + 2 * candidates + operation.tries
    else
      return nil, at
    end
    list[#list + 1] = operation
  end
  if at ~= #argv + 1 or #list > 64 then
    return nil, #argv
  end
  return list
end
