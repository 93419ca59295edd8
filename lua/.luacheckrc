-- What Redis offers to a script, and nothing else.
std = {
  read_globals = {
    "cjson", "ipairs", "math", "next", "pairs", "pcall", "redis", "string", "table", "tonumber",
    "tostring", "type", "unpack", "KEYS", "ARGV",
  },
}
max_line_length = 100
