#!/usr/bin/env bash
# Unpack the programs of requirements/debian.txt into .tools, unless they are installed already.
# Needs no root where apt's package lists are present; otherwise root or sudo fetches the lists.
set -euo pipefail

folder=.tools/debian
mkdir -p "$folder" .tools/bin

update_lists() {
  if [[ $(id -u) == 0 ]]; then
    apt-get update -q
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    sudo apt-get update -q
  else
    return 1
  fi
}

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

while read -r package _; do
  [[ -z $package || $package == '#'* ]] && continue
  if ! command -v "$package" >/dev/null; then
    unpack "$package"
  fi
done <requirements/debian.txt
