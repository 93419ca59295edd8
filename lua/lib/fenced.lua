-- fenced(key, epoch, owner): nil if a controller write of (epoch, owner) may go on, which raises
-- the fence; else the refusal. The higher epoch wins; one epoch has one owner.
--@include lib/whole
local function fenced(key, epoch, owner)
  local seen = redis.call('HMGET', key, 'epoch', 'owner')
  local highest = whole(seen[1], 0, 0, 9e15)
  local mine = whole(epoch, 0, 0, 9e15)
  if mine < highest or mine == highest and seen[2] and seen[2] ~= owner then
    return { 'FENCED', string.format('%.0f', highest), seen[2] or '' }
  end
  if mine > highest or not seen[2] then
    redis.call('HSET', key, 'epoch', string.format('%.0f', mine), 'owner', owner)
  end
  return nil
end
