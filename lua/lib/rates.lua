-- rates(weight, known): what a stored weight "inverse-throughput cap penalty" says, within its
-- bounds. `known` remembers it: a fleet has few kinds of replicas.
--@include lib/whole
local function rates(weight, known)
  local text = weight or ''
  if not known[text] then
    local inverse, cap, penalty = string.match(text, '^(%d+) (%d+) (%d+)$')
    known[text] = {
      inverse = whole(inverse, 1000, 1, 1e6),
      cap = whole(cap, 256, 0, 1e9),
      penalty = whole(penalty, 0, 0, 1e12),
    }
  end
  return known[text]
end
