-- plain(argv, first): whether the batch from argv[first] on has four operations at most, all of them
-- well-formed, and its reserves exclude no replica: then they are carried out one by one, which costs
-- less than a batch's books. Under light load most batches are such, and for each reserve somebody
-- waits.
local function plain(argv, first)
  local at, last, count = first, #argv, 0
  while at <= last and count < 4 do
    local verb, request = argv[at], argv[at + 1] or ''
    if #request < 1 or #request > 200 then
      return false
    elseif verb == 'A' and argv[at + 5] == '0' and string.find(argv[at + 4], '^1?%d$')
      and tonumber(argv[at + 4]) <= 16 then
      at = at + 6 + 2 * argv[at + 4]
    elseif verb == 'R' then
      at = at + 2
    elseif verb == 'D' and #(argv[at + 2] or '') <= 128
      and string.find(argv[at + 2] or '', '^%w[%w%._:/@+-]*$') then
      at = at + 4
    else
      return false
    end
    count = count + 1
  end
  return at == last + 1
end
