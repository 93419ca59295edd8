#!/usr/bin/env bash
# Sees to the programs that the tests need from the system: installs what is missing where we are
# root on Debian, else says what to install. Nothing is ever skipped for want of a program.
set -euo pipefail
. "$(dirname "$0")/common.sh"
PATH="$PATH:/usr/sbin:/sbin"

# program:Debian package that has it
needed=(redis-server:redis-server luacheck:lua-check)

missing=()
for pair in "${needed[@]}"; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
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
  command -v "${pair%%:*}" >/dev/null || die "${pair%%:*} is still not on PATH"
done
