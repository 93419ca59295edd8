-- stream/close: cancel a resumable stream, or give its journal up.
--
-- Guarantee: nobody reads it or goes on with it from now on, and its content is gone; its writer
--   learns it with its next append. A stream that has ended already only loses its content. A
--   writer closes what is still its own only; its owner closes it whoever writes.
-- KEYS 2
--   1 hash {s:<id>}:meta
--   2 stream {s:<id>}:tokens
-- ARGV 3
--   1 state: cancelled or lost
--   2 writer: proxy; empty for the owner
--   3 epoch: fencing number of that writer
-- RETURN
--   OK
--   FENCED writer: another proxy goes on with the stream
--   ABSENT
-- Cost: O(appends)
-- Callers: proxy
local meta, tokens = KEYS[1], KEYS[2]
local state, writer, epoch = ARGV[1], ARGV[2], ARGV[3]
redis.call('HDEL', meta, '')

local held = redis.call('HMGET', meta, 'writer', 'epoch')
if not held[1] then
  return { 'ABSENT' }
elseif writer ~= '' and (held[1] ~= writer or held[2] ~= epoch) then
  return { 'FENCED', held[1] }
end
redis.call('HSET', meta, 'state', state, 'body', '')
redis.call('DEL', tokens)
return { 'OK' }
