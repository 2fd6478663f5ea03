#!/usr/bin/env bash
# Install the development environment into .venv. A run that was interrupted can simply be repeated:
# the stamp .venv/installed is the last thing written.
set -euo pipefail

python=${PYTHON:-python3.11}
export PIP_DISABLE_PIP_VERSION_CHECK=1

pip_install() { .venv/bin/python -m pip install "$@"; }

rm -f .venv/installed
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  "$python" -m venv --clear .venv
fi

# torch first and with its dependencies, so that pip may take whichever build it is offered. The
# rest is pinned completely and needs no resolving; torchvision and sglang would ask for CUDA.
pip_install "$(grep '^torch==' requirements/serving-cpu.txt)"
pip_install --no-deps -r requirements/serving-cpu.txt
pip_install --no-deps -r requirements/dev.txt
pip_install --no-deps --no-build-isolation ./tests/cpu_engine -e .

touch .venv/installed
