-- stream/append: the writer of a resumable stream adds to its journal, or says that it lives.
--
-- Guarantee: only by the writer of the current epoch, without a gap, and each event once: what is
--   there already is not added again. Both keys end a life after the last append.
-- KEYS 2
--   1 hash {s:<id>}:meta
--   2 stream {s:<id>}:tokens
-- ARGV 9
--   1 writer: proxy
--   2 epoch: fencing number
--   3 lease: ms; 0 gives it up
--   4 life: ms
--   5 state: live, done or broken
--   6 first: number of the first event
--   7 last: number of the last event; 0 adds nothing
--   8 events: text
--   9 tape: JSON
-- RETURN
--   OK idle: ms since a reader looked, -1 if none did
--   FENCED writer: another proxy goes on with the stream
--   ENDED state: it was cancelled, or given up
--   GAP last: events before these are missing
--   ABSENT
-- Cost: O(events)
-- Callers: proxy
--@include lib/whole
--@include lib/digits
--@include lib/now_ms
local meta, tokens = KEYS[1], KEYS[2]
local writer, epoch, state = ARGV[1], ARGV[2], ARGV[5]
local lease, life = whole(ARGV[3], 4000, 0, 3600000), whole(ARGV[4], 600000, 1, 1e12)
local first, last = whole(ARGV[6], 0, 0, 9e15), whole(ARGV[7], 0, 0, 9e15)
redis.call('HDEL', meta, '')

local held = redis.call('HMGET', meta, 'writer', 'epoch', 'state', 'last', 'read')
if not held[1] then
  return { 'ABSENT' }
elseif held[1] ~= writer or held[2] ~= epoch then
  return { 'FENCED', held[1] }
elseif held[3] ~= 'live' and held[3] ~= state then
  return { 'ENDED', held[3] or '' }
end
local written = whole(held[4], 0, 0, 9e15)
if last > written then
  if first ~= written + 1 then
    return { 'GAP', digits(written) }
  end
  redis.call('XADD', tokens, ARGV[7] .. '-0', 'first', ARGV[6], 'events', ARGV[8], 'tape', ARGV[9])
  redis.call('HSET', meta, 'last', ARGV[7])
  redis.call('HINCRBY', meta, 'bytes', digits(#ARGV[8] + #ARGV[9]))
end
local now = now_ms()
redis.call('HSET', meta, 'state', state, 'lease', digits(now + lease))
redis.call('PEXPIRE', meta, digits(life))
redis.call('PEXPIRE', tokens, digits(life))
local read = whole(held[5], 0, 0, 9e15)
return { 'OK', read > 0 and math.max(0, now - read) or -1 }
