-- stream/close: cancel a resumable stream, or give its journal up.
--
-- Guarantee: nobody reads it or goes on with it from now on, and its content is gone; its writer
--   learns it with its next append. A stream that has ended already only loses its content.
-- KEYS 2
--   1 hash {s:<id>}:meta
--   2 stream {s:<id>}:tokens
-- ARGV 1
--   1 state: cancelled or lost
-- RETURN
--   OK
--   ABSENT
-- Cost: O(appends)
-- Callers: proxy
local meta, tokens = KEYS[1], KEYS[2]
redis.call('HDEL', meta, '')

if redis.call('HEXISTS', meta, 'writer') == 0 then
  return { 'ABSENT' }
end
redis.call('HSET', meta, 'state', ARGV[1], 'body', '')
redis.call('DEL', tokens)
return { 'OK' }
