-- outdated(epoch, leader, mine, owner): nil if a fleet write of the leadership (mine, owner) may go
-- on, which raises the epoch after a loss of data; else the refusal. The higher epoch wins; of two
-- owners with one epoch (a failover may forget that it was given), the one that holds the lease.
--@include lib/whole
local function outdated(epoch, leader, mine, owner)
  local last = whole(redis.call('GET', epoch), 0, 0, 9e15)
  local held = redis.call('HMGET', leader, 'epoch', 'id')
  local number = whole(mine, 0, 0, 9e15)
  local twin = number == last and held[2] and whole(held[1], 0, 0, 9e15) == last
  if number < last or twin and held[2] ~= owner then
    return { 'FENCED', string.format('%.0f', last), held[2] or '' }
  elseif number > last then
    redis.call('SET', epoch, string.format('%.0f', number))
  end
  return nil
end
