-- stream/open: a proxy begins the journal of a resumable stream.
--
-- Guarantee: an id that is in use stays with its writer. The journal ends by itself.
-- KEYS 1
--   1 hash {s:<id>}:meta
-- ARGV 8
--   1 writer: proxy
--   2 lease: ms
--   3 life: ms
--   4 model: name
--   5 path: of the engine's route
--   6 owner: digest
--   7 request: id
--   8 body: JSON
-- RETURN
--   OK
--   TAKEN writer: there is such a stream
-- Cost: O(body)
-- Callers: proxy
--@include lib/whole
--@include lib/digits
--@include lib/now_ms
local meta = KEYS[1]
local writer, lease, life = ARGV[1], whole(ARGV[2], 4000, 0, 3600000), whole(ARGV[3], 600000, 1, 1e12)
redis.call('HDEL', meta, '')

local held = redis.call('HMGET', meta, 'writer', 'epoch')
if held[1] and (held[1] ~= writer or held[2] ~= '1') then
  return { 'TAKEN', held[1] }
end
if not held[1] then
  redis.call('HSET', meta, 'model', ARGV[4], 'path', ARGV[5], 'owner', ARGV[6], 'request', ARGV[7],
    'body', ARGV[8], 'writer', writer, 'epoch', '1', 'state', 'live', 'last', '0',
    'bytes', digits(#ARGV[8]))
end
redis.call('HSET', meta, 'lease', digits(now_ms() + lease))
redis.call('PEXPIRE', meta, digits(life))
return { 'OK' }
