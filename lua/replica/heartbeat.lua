-- replica/heartbeat: an agent says which replicas live, and what their engines report.
--
-- Guarantee: beats only for replicas whose record is of the same incarnation; the others are named.
-- KEYS 3
--   1 zset {M}:hb
--   2 hash {M}:replicas
--   3 hash {M}:stat
-- ARGV 0+
--   then, for each replica: rid gen running(requests) waiting(requests) kv_usage(percent)
-- RETURN
--   OK rid..: replicas that are unknown or of another incarnation
-- Cost: O(replicas of one host)
-- Callers: agent
--@include lib/whole
--@include lib/digits
--@include lib/record_of
--@include lib/now_ms
local hb, replicas, stat = KEYS[1], KEYS[2], KEYS[3]
redis.call('ZREM', hb, '')
redis.call('HDEL', stat, '')

local now = digits(now_ms())
local reply = { 'OK' }
for at = 1, #ARGV - 4, 5 do
  local rid = ARGV[at]
  local record = record_of(redis.call('HGET', replicas, rid))
  if record and record.gen == tonumber(ARGV[at + 1]) then
    local running = whole(ARGV[at + 2], 0, 0, 1e9)
    local waiting = whole(ARGV[at + 3], 0, 0, 1e9)
    local usage = whole(ARGV[at + 4], 0, 0, 100)
    redis.call('ZADD', hb, now, rid)
    redis.call('HSET', stat, rid, string.format('%d %d %d %s', running, waiting, usage, now))
  else
    reply[#reply + 1] = rid
  end
end
return reply
