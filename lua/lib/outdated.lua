-- outdated(key, epoch): nil if a fleet write of this epoch may go on, which raises the epoch after
-- a loss of data; else the refusal.
--@include lib/whole
local function outdated(key, epoch)
  local last = whole(redis.call('GET', key), 0, 0, 9e15)
  local mine = whole(epoch, 0, 0, 9e15)
  if mine < last then
    return { 'FENCED', string.format('%.0f', last), '' }
  elseif mine > last then
    redis.call('SET', key, string.format('%.0f', mine))
  end
  return nil
end
