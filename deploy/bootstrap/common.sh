# Sourced by the scripts beside it: where the repository is, how they speak, which Python they use.
# shellcheck shell=bash

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
tools="$repository/.tools"

say() { printf 'setup: %s\n' "$*"; }

die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# can_run PYTHON: it exists and is 3.11 or newer (a pyenv shim may exist and still not run).
can_run() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# pythons: print every Python that may be used, the best one first: $PYTHON alone if that is set, else
# the system's own, then those on PATH. Debian's is built with profiling and link-time optimisation;
# what pyenv compiles is not unless it was told to, and takes half as long again for all we do.
pythons() {
  local name system=${SYSTEM_PYTHON-/usr/bin/python3}
  if [ -n "${PYTHON:-}" ]; then
    can_run "$PYTHON" || die "PYTHON=$PYTHON does not run, or is older than 3.11"
    command -v "$PYTHON"
    return
  fi
  for name in ${system:+"$system"} python3 python3.11 python3.12 python3.13 python3.14 python; do
    if can_run "$name"; then
      command -v "$name"
    fi
  done
}

# find_python: print the best Python.
find_python() {
  local found
  found=$(pythons) || exit 1
  [ -n "$found" ] || die "no Python 3.11 or newer on PATH; on Debian 12: apt-get install python3"
  printf '%s\n' "${found%%$'\n'*}"
}

# apt_install PACKAGE...: install Debian packages as root, without starting the services in them.
# A subshell: the trap takes the switch away again however this ends.
apt_install() (
  policy=/usr/sbin/policy-rc.d
  # Debian asks this file before it starts a service; 101 means no.
  if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  export DEBIAN_FRONTEND=noninteractive
  exec </dev/null >/dev/null
  apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"
)

may_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
