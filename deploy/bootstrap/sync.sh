#!/usr/bin/env bash
# Makes .venv exactly what uv.lock says, with a Python of this machine (none is downloaded).
set -euo pipefail
. "$(dirname "$0")/common.sh"

export UV_PYTHON_DOWNLOADS=never
unset VIRTUAL_ENV # a shell's active environment is not the one meant
# Compiled now, once: where the environment forbids Python to keep bytecode (containers often do),
# each of the hundreds of processes that the tests start would compile the same modules again.
options=(--frozen --extra all --quiet --compile-bytecode)
# A .venv that works stays with its Python; only a new one has to choose.
if ! can_run "$repository/.venv/bin/python"; then
  options+=(--python "$(find_python)")
  say "making .venv"
fi
cd "$repository"
"$tools/bin/uv" sync "${options[@]}" </dev/null ||
  die "uv sync failed (see above); without network it needs every package of uv.lock in its cache"
