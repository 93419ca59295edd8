-- settle(keys, book): write the totals and scores that `charge` changed. Scores come first: the
-- other keys have been read, so that whatever is wrong with a key shows before the first write.
--@include lib/digits
local function settle(keys, book)
  if #book.charged == 0 then
    return
  end
  local places, requests, costs, idle = {}, {}, {}, {}
  for index = 1, #book.charged do
    local account = book.charged[index]
    local rid, outstanding = book.names[account], book.requests[account]
    places[2 * index - 1], places[2 * index] = digits(book.scores[account]), rid
    if outstanding > 0 then
      local next = #requests + 1
      requests[next], requests[next + 1] = rid, digits(outstanding)
      costs[next], costs[next + 1] = rid, digits(book.costs[account])
    else
      idle[#idle + 1] = rid
    end
  end
  redis.call('ZADD', keys.ready, 'XX', unpack(places))
  if #costs > 0 then
    redis.call('HSET', keys.cost, unpack(costs))
  end
  if #idle > 0 then
    redis.call('HDEL', keys.cost, unpack(idle))
  end
  if book.total > 0 then
    redis.call('HSET', keys.nreq, '*', digits(book.total), unpack(requests))
  else
    idle[#idle + 1] = '*'
  end
  if #idle > 0 then
    redis.call('HDEL', keys.nreq, unpack(idle))
  end
end
