-- stream/read: the events of a resumable stream after a given one, and how the stream stands.
--
-- Guarantee: one consistent moment. Notes, once a second at most, that somebody reads.
-- KEYS 2
--   1 hash {s:<id>}:meta
--   2 stream {s:<id>}:tokens
-- ARGV 2
--   1 after: number of an event
--   2 count: appends to give at most
-- RETURN
--   OK state epoch last lease first events..: lease = ms left of the writer's; then number of the
--   first event and text, append by append
--   ABSENT
-- Cost: O(appends given)
-- Callers: proxy
--@include lib/whole
--@include lib/digits
--@include lib/now_ms
local meta, tokens = KEYS[1], KEYS[2]
local after = whole(ARGV[1], 0, 0, 9e15)
redis.call('HDEL', meta, '')

local held = redis.call('HMGET', meta, 'state', 'epoch', 'last', 'lease', 'read')
if not held[1] then
  return { 'ABSENT' }
end
local now = now_ms()
if held[1] == 'live' and math.abs(now - whole(held[5], 0, 0, 9e15)) >= 1000 then
  redis.call('HSET', meta, 'read', digits(now))
end
local left = math.max(0, whole(held[4], 0, 0, 9e15) - now)
local reply = { 'OK', held[1], held[2] or '0', held[3] or '0', left }
for _, entry in ipairs(redis.call('XRANGE', tokens, digits(after + 1), '+', 'COUNT', ARGV[2])) do
  local fields = {}
  for at = 1, #entry[2], 2 do
    fields[entry[2][at]] = entry[2][at + 1]
  end
  table.insert(reply, fields.first or '0')
  table.insert(reply, fields.events or '')
end
return reply
