-- spacious(key, sorted): make Redis keep a hash or a `sorted` set as a table. A small one it keeps as a
-- list, which it searches from the beginning: among some hundred fields a look at one costs ten times
-- as much. A name of more than 64 bytes makes it a table, until it is empty or loaded from disk. A
-- server that does not tell, or has no memory left, is left in peace.
local function spacious(key, sorted)
  local encoding, name = redis.pcall('OBJECT', 'ENCODING', key), string.rep('-', 65)
  if encoding ~= 'listpack' and encoding ~= 'ziplist' then
    return
  elseif sorted then
    redis.pcall('ZADD', key, '0', name)
    redis.pcall('ZREM', key, name)
  else
    redis.pcall('HSET', key, name, '')
    redis.pcall('HDEL', key, name)
  end
end
