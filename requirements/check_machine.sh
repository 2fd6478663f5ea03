#!/usr/bin/env bash
# Name everything this machine lacks for the development environment, with the command that adds it.
set -euo pipefail

python=${PYTHON:-python3.11}
needed_gib=5 # the environment takes 3.2 GiB with a CPU build of torch, and pip unpacks beside it
missing=0

lacks() {
  missing=1
  printf 'missing: %s\n   run: %s\n' "$1" "$2" >&2
}

if [[ $(uname -s) != Linux ]]; then
  lacks "Linux: SGLang serves there only, this is $(uname -s)" "a Debian or Ubuntu machine"
fi

if ! "$python" -c 'import sys; assert sys.version_info[:2] == (3, 11)' 2>/dev/null; then
  lacks "Python 3.11 as '$python'" \
    "apt-get install python3.11 python3.11-venv (Debian 12); elsewhere put a python3.11 on PATH, or name it: make PYTHON=/path/to/python3.11"
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  lacks "the venv module of $python" "apt-get install python3.11-venv"
fi

if [[ ! -f .venv/installed ]]; then
  free_gib=$(($(df --output=avail -k . | tail -1) / 1024 / 1024))
  if ((free_gib < needed_gib)); then
    lacks "disk space: $free_gib GiB free in $PWD, $needed_gib GiB needed" \
      "free some space, or clone into a folder on a larger disk"
  fi
fi

if [[ ! -w . ]]; then
  lacks "write permission in $PWD" "clone into a folder of your own"
fi

if [[ ! -w /dev/shm ]]; then
  lacks "a writable /dev/shm, where the shared table lives" "mount -t tmpfs tmpfs /dev/shm"
fi

exit "$missing"
