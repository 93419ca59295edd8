#!/usr/bin/env bash
# Sees to what the demo, the engine, the tests or the benchmark need from the system: installs what
# is missing where we are root on Debian, else says what to install. Nothing is ever skipped for
# want of it.
# Usage: system.sh demo|engine|tests|bench
set -euo pipefail
. "$(dirname "$0")/common.sh"
PATH="$PATH:/usr/sbin:/sbin"

# Each line: what must be there (a program, a library by its file name, or a path), and its Debian
# package.
compiler=(cc:gcc /usr/include/stdio.h:libc6-dev) # the benchmark's load generator is in C
case "${1:-}" in
demo) needed=(curl:curl redis-cli:redis-tools) ;;
engine) needed=(libnuma.so.1:libnuma1) ;; # vLLM's CPU kernels are linked with it
tests)
  needed=(redis-server:redis-server luacheck:lua-check ip:iproute2 openssl:openssl "${compiler[@]}")
  ;;
bench) needed=(redis-server:redis-server nginx:nginx-light "${compiler[@]}") ;;
*) die "usage: system.sh demo|engine|tests|bench" ;;
esac

is_there() {
  case "$1" in
  /*) [ -e "$1" ] ;;
  *.so.*) ldconfig -p | grep -F "$1" >/dev/null ;;
  *) command -v "$1" >/dev/null ;;
  esac
}

missing=()
for pair in "${needed[@]}"; do
  is_there "${pair%%:*}" || missing+=("${pair#*:}")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

may_apt || die "missing system packages: ${missing[*]}; as root: apt-get install ${missing[*]}"
say "installing Debian packages: ${missing[*]}"
apt_install "${missing[@]}" || die "apt-get could not install: ${missing[*]}"
# We start servers of our own; a package's service would only occupy its port.
for service in redis-server nginx; do
  if [[ " ${missing[*]} " = *" $service"* ]] && [ -d /run/systemd/system ]; then
    systemctl disable --quiet "$service"
  fi
done
for pair in "${needed[@]}"; do
  is_there "${pair%%:*}" || die "${pair%%:*} is still missing after installing ${pair#*:}"
done
