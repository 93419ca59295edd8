#!/usr/bin/env bash
# Puts uv into .tools/bin of the repository, whatever the Python at hand allows, and never touches
# the system's Python: a virtual environment where venv works, else `pip --target`, else Debian's
# python3-venv where we are root. Does nothing when the wanted version is there.
set -euo pipefail
. "$(dirname "$0")/common.sh"

version=0.13.9
uv="$tools/bin/uv"

if [ -x "$uv" ] && [ "$("$uv" --version 2>/dev/null | cut -d' ' -f2)" = "$version" ]; then
  exit 0
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
pip_options=(--quiet --disable-pip-version-check --no-input)

by_venv() {
  rm -rf "$tools"
  "$1" -m venv "$tools" >>"$log" 2>&1 &&
    "$tools/bin/python" -m pip install "${pip_options[@]}" "uv==$version" >>"$log" 2>&1
}

by_target() {
  rm -rf "$tools"
  "$1" -m pip --version >>"$log" 2>&1 &&
    "$1" -m pip install "${pip_options[@]}" --target "$tools/lib" "uv==$version" >>"$log" 2>&1 &&
    mkdir -p "$tools/bin" && ln -s ../lib/bin/uv "$uv"
}

by_apt() {
  may_apt || return 1
  say "installing Debian's python3-venv, since $python brings neither venv nor pip"
  apt_install python3-venv >>"$log" 2>&1 && can_run /usr/bin/python3 && by_venv /usr/bin/python3
}

by_any() {
  local python
  for python in $(pythons); do
    say "getting uv $version with $python"
    if by_venv "$python" || by_target "$python"; then return; fi
  done
  return 1
}

python=$(find_python)
if ! { by_any || by_apt; }; then
  rm -rf "$tools"
  cat "$log" >&2
  die "could not install uv $version (see above). It needs the network and one of: python3-venv
       (Debian: apt-get install python3-venv), pip, or root rights to install the former."
fi
"$uv" --version >/dev/null || die "$uv does not run on this machine"
say "uv $version is in .tools"
