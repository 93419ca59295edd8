-- stream/claim: a proxy takes over a resumable stream whose writer has not been heard of.
--
-- Guarantee: one claimant for each epoch, and none while the writer's lease lasts. A lease that
--   would last absurdly long (a clock that jumped) counts as over.
-- KEYS 2
--   1 hash {s:<id>}:meta
--   2 stream {s:<id>}:tokens
-- ARGV 4
--   1 writer: proxy
--   2 epoch: the one that was seen
--   3 lease: ms
--   4 life: ms
-- RETURN
--   OK epoch bytes last first last tape..: bytes and last event of the journal; then first event,
--   last event and tape, append by append
--   HELD writer: it lives, or another proxy was faster
--   ENDED state: there is nothing to go on with
--   ABSENT
-- Cost: O(appends)
-- Callers: proxy
--@include lib/whole
--@include lib/digits
--@include lib/now_ms
local meta, tokens = KEYS[1], KEYS[2]
local writer, seen = ARGV[1], whole(ARGV[2], 0, 0, 9e15)
local lease, life = whole(ARGV[3], 4000, 0, 3600000), whole(ARGV[4], 600000, 1, 1e12)
redis.call('HDEL', meta, '')

local held = redis.call('HMGET', meta, 'writer', 'epoch', 'state', 'lease', 'last', 'bytes')
if not held[1] then
  return { 'ABSENT' }
elseif held[3] ~= 'live' then
  return { 'ENDED', held[3] or '' }
end
local epoch, now = whole(held[2], 0, 0, 9e15), now_ms()
if epoch ~= seen + 1 or held[1] ~= writer then
  local left = whole(held[4], 0, 0, 9e15) - now
  if epoch ~= seen or left > 0 and left <= 4 * lease then
    return { 'HELD', held[1] }
  end
end
redis.call('HSET', meta, 'writer', writer, 'epoch', digits(seen + 1), 'lease', digits(now + lease))
redis.call('PEXPIRE', meta, digits(life))
redis.call('PEXPIRE', tokens, digits(life))
local reply = { 'OK', digits(seen + 1), held[6] or '0', held[5] or '0' }
for _, entry in ipairs(redis.call('XRANGE', tokens, '-', '+')) do
  local fields = {}
  for at = 1, #entry[2], 2 do
    fields[entry[2][at]] = entry[2][at + 1]
  end
  table.insert(reply, fields.first or '0')
  table.insert(reply, string.match(entry[1], '^%d+'))
  table.insert(reply, fields.tape or '')
end
return reply
