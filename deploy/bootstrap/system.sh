#!/usr/bin/env bash
# Sees to what the demo, the engine or the tests need from the system: installs what is missing
# where we are root on Debian, else says what to install. Nothing is ever skipped for want of it.
# Usage: system.sh demo|engine|tests
set -euo pipefail
. "$(dirname "$0")/common.sh"
PATH="$PATH:/usr/sbin:/sbin"

# Each line: what must be there (a program, or a library by its file name), and its Debian package.
case "${1:-}" in
demo) needed=(curl:curl redis-cli:redis-tools) ;;
engine) needed=(libnuma.so.1:libnuma1) ;; # vLLM's CPU kernels are linked with it
tests) needed=(redis-server:redis-server luacheck:lua-check ip:iproute2) ;;
*) die "usage: system.sh demo|engine|tests" ;;
esac

is_there() {
  case "$1" in
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
# The tests start servers of their own; the package's service would only occupy port 6379.
if [[ " ${missing[*]} " = *" redis-server "* ]] && [ -d /run/systemd/system ]; then
  systemctl disable --quiet redis-server
fi
for pair in "${needed[@]}"; do
  is_there "${pair%%:*}" || die "${pair%%:*} is still missing after installing ${pair#*:}"
done
