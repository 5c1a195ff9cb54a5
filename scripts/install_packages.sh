#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that are named and missing, where that is possible; says
# what to do where it is not. The build has other ways to find most of them, so that is no error.
set -euo pipefail

missing=()
for package in "$@"; do
  dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null |
    grep -q 'install ok installed' || missing+=("$package")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

if ! command -v apt-get >/dev/null; then
  echo "Not a Debian or Ubuntu machine: install the counterparts of ${missing[*]} by hand."
  exit 0
fi
root=()
if [[ $(id -u) -ne 0 ]]; then
  if ! sudo -n true 2>/dev/null; then
    echo "Missing packages. As root: apt-get install ${missing[*]}"
    exit 0
  fi
  root=(sudo -n)
fi
export DEBIAN_FRONTEND=noninteractive
"${root[@]}" apt-get update --quiet=2
"${root[@]}" apt-get install --quiet=2 --yes --no-install-recommends "${missing[@]}" >/dev/null
