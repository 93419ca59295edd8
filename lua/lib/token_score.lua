-- token_score(weights, rid): what one token of cost adds to the score of a replica; 1000 is usual.
--@include lib/whole
local function token_score(weights, rid)
  local text = string.match(redis.call('HGET', weights, rid) or '', '^(%d+) %d+ %d+$')
  return whole(text, 1000, 1, 1e6)
end
