-- next_version(text, now): the version after `text`: max(previous + 1, now in ms). It grows even if
-- a failover forgot the last ones, because the clock went on.
--@include lib/whole
local function next_version(text, now)
  return math.max(whole(text, 0, 0, 9e15) + 1, now)
end
