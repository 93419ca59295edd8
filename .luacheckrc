-- The scripts run inside Redis: Lua 5.1 without io, os, require and globals of one's own.
-- Checked is the assembled text (python -m shared.registry.scripts), as Redis gets it.
stds.redis = {
  globals = {},
  read_globals = {
    "KEYS", "ARGV",
    redis = {
      fields = {
        "call", "pcall", "error_reply", "status_reply", "sha1hex", "log",
        "LOG_DEBUG", "LOG_VERBOSE", "LOG_NOTICE", "LOG_WARNING",
      },
    },
    cjson = { fields = { "encode", "decode", "null" } },
    math = {
      fields = {
        "abs", "ceil", "floor", "fmod", "huge", "log", "max", "min", "modf", "pow", "sqrt",
      },
    },
    string = {
      fields = {
        "byte", "char", "find", "format", "gmatch", "gsub", "len", "lower", "match", "rep",
        "reverse", "sub", "upper",
      },
    },
    table = { fields = { "concat", "insert", "maxn", "remove", "sort" } },
    "error", "ipairs", "next", "pairs", "pcall", "select", "tonumber", "tostring", "type", "unpack",
  },
}
std = "redis"
max_line_length = 120
max_cyclomatic_complexity = 30
