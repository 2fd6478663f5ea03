#!/usr/bin/env bash
# Bring the programs of requirements/debian.txt here, unless they are installed already.
# To unpack needs no root where apt's package lists are present; to install needs root or sudo.
set -euo pipefail

folder=.tools/debian
mkdir -p "$folder" .tools/bin

as_root() {
  if [[ $(id -u) == 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    sudo "$@"
  else
    return 1
  fi
}

update_lists() { as_root apt-get update -q; }

fetch() { (cd "$folder" && apt-get download -q "$1"); }

unpack() {
  local package=$1 program archives
  rm -f "$folder/$package"_*.deb
  if ! fetch "$package" 2>/dev/null && ! { update_lists && fetch "$package"; }; then
    printf 'missing: the Debian package %s\n   run: sudo apt-get update && make tools\n' \
      "$package" >&2
    return 1
  fi
  archives=("$folder/$package"_*.deb)
  dpkg-deb --extract "${archives[0]}" "$folder/$package"
  rm "${archives[0]}"
  for program in "$folder/$package"/usr/bin/*; do
    ln -sf "../../$program" ".tools/bin/$(basename "$program")"
  done
}

apt_install() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$1"
}

install() {
  if ! apt_install "$1" </dev/null && ! { update_lists && apt_install "$1" </dev/null; }; then
    printf 'missing: the Debian package %s\n   run: sudo apt-get install %s\n' "$1" "$1" >&2
    return 1
  fi
}

while read -r package how _; do
  [[ -z $package || $package == '#'* ]] && continue
  if ! command -v "$package" >/dev/null; then
    "$how" "$package"
  fi
done <requirements/debian.txt
