"""Runs the real scripts, as assembled for Redis, in Lua 5.1 on a `Store`."""

import importlib
import json
from collections.abc import Sequence
from typing import Any, Final, cast

from redis.exceptions import ResponseError

from shared.registry.loader import ScriptLibrary
from tests.simulation.store import Store

ARRAYS: Final = (
    "HGETALL",
    "HMGET",
    "HVALS",
    "TIME",
    "ZMSCORE",
    "ZRANGE",
    "ZRANGEBYSCORE",
)
PRELUDE: Final = """
return function(call, encode, decode, arrays)
  redis = {
    call = function(name, ...)
      if name == 'HSCAN' then
        return { '0', { call('HGETALL', (...)) } }
      elseif arrays[name] then
        return { call(name, ...) }
      end
      return (call(name, ...))
    end,
    pcall = function(...) return (call(...)) end,
    error_reply = function(text) return { err = text } end,
  }
  cjson = { encode = encode, decode = decode }
  return function(script) return function(count, ...)
    local all, keys, args = { ... }, {}, {}
    for index = 1, #all do
      if index <= count then keys[index] = all[index] else args[index - count] = all[index] end
    end
    return script(keys, args)
  end end
end
"""
_LUA: Final = importlib.import_module("lupa.lua51")


class LuaHost:
    """All scripts of one library, compiled once."""

    def __init__(self, library: ScriptLibrary) -> None:
        self.library = library
        self.store = Store()
        self._lua: Any = _LUA.LuaRuntime(unpack_returned_tuples=True)
        arrays = self._lua.table_from(dict.fromkeys(ARRAYS, True))
        wrap = self._lua.execute(PRELUDE)(self._call, self._encode, self._decode, arrays)
        self._scripts: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self._by_text: dict[str, str] = {}
        for name in library.names:
            script = library[name]
            compiled = self._lua.execute(f"return function(KEYS, ARGV) {script.text} end")
            self._scripts[script.sha] = wrap(compiled)
            self.names[script.sha] = name
            self._by_text[script.text] = name

    def name_of(self, command: Sequence[str]) -> str:
        """Name the script that a command runs; EVAL counts like EVALSHA."""
        if command[0] == "EVALSHA":
            return self.names.get(command[1], "?")
        return self._by_text.get(command[1], "?") if command[0] == "EVAL" else "?"

    def run(self, sha: str, store: Store, count: int, parts: Sequence[str]) -> Any:  # noqa: ANN401 - any reply
        """Run a script and give its reply as the client library would."""
        self.store = store
        return _reply(self._scripts[sha](count, *parts))

    def _call(self, name: str, *args: Any) -> Any:  # noqa: ANN401 - as Lua passes it
        return self.store.call(name, *args)

    def _decode(self, text: str) -> Any:  # noqa: ANN401 - any JSON
        return self._table(json.loads(text))

    def _table(self, value: Any) -> Any:  # noqa: ANN401 - any JSON
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            return self._lua.table_from({name: self._table(each) for name, each in fields.items()})
        if isinstance(value, list):
            return self._lua.table_from([self._table(each) for each in cast("list[Any]", value)])
        return _NULL if value is None else value

    def _encode(self, table: Any) -> str:  # noqa: ANN401 - any Lua value
        return json.dumps(_plain(table), separators=(",", ":"))


class _Null:
    """JSON's null inside Lua, where nil would drop the field."""


_NULL: Final = _Null()


def _plain(value: Any) -> Any:  # noqa: ANN401 - any Lua value
    if _LUA.lua_type(value) == "table":
        keys = list(value)
        if keys and all(isinstance(key, int) for key in keys):
            return [_plain(value[key]) for key in keys]
        return {str(key): _plain(value[key]) for key in keys}
    if isinstance(value, _Null):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.14g}")
    return value


def _reply(value: Any) -> Any:  # noqa: ANN401 - any Lua value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bool):
        return 1 if value else None
    if isinstance(value, float):
        return int(value)
    if _LUA.lua_type(value) == "table":
        if value["err"] is not None:
            raise ResponseError(str(value["err"]))
        return [_reply(each) for each in value.values()]
    return value
