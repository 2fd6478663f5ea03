"""Bundle, what a person finds in it: how to put it together, install it and run it."""

from __future__ import annotations

OUTER_README = """\
Put together and installed on the GPU machine, with the Python that has torch for its GPU:

    sha256sum -c SHA256SUMS
    cat bundle.tar.part* | tar x
    bundle/install.sh /path/to/python        # into a virtual environment beside it, see its README
    bundle/run.sh --minutes 60               # or: bundle/run.sh --test

Nothing here needs a network.
"""

README = """\
# sglang-alloc for a GPU machine without a network

Made for Python {python}, SGLang {sglang}, GPU architecture {architecture}, from commit {commit}.

`install.sh PYTHON` makes a virtual environment `venv` that sees the packages of PYTHON (torch, that
must be there, and what was left out below), and installs the wheels of this bundle into it.
`run.sh` runs the bench in it; what you give it goes to `python -m moe_bench` (`--help` tells more).
`run.sh --test` runs the kernels' tests. Results are in `results/moe-cuda.csv`; a run that was cut
goes on when it is started again.

SGLang runs here with `--attention-backend triton --sampling-backend pytorch`, so FlashInfer is not
needed, and of its kernel wheel only the Python files and the binary for {architecture} are here.

## What was left out, and why

{left_out}
"""

INSTALL = """\
#!/usr/bin/env bash
# Install the bundle's wheels into bundle/venv, on top of the packages of the Python given.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${1:?usage: install.sh PYTHON (one that has torch for this GPU)}"
"$python" -c 'import torch, sys; sys.exit(not torch.version.cuda)' ||
  { echo "install.sh: $python has no CUDA build of torch; install that first" >&2; exit 1; }
"$python" -m venv --system-site-packages "$here/venv"
# Where PYTHON is itself one of a virtual environment, its packages are no system packages.
there="$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')"
echo "$there" >"$("$here/venv/bin/python" -c \
  'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
"$here/venv/bin/python" -m pip install --no-index --no-deps "$here"/wheels/*.whl
"$here/venv/bin/python" -c 'import sglang, sglang_alloc, torch; print(torch.cuda.get_device_name())'
"""

RUN = """\
#!/usr/bin/env bash
# Run the bench (its options pass through), or with --test the kernels' tests.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/source"
export PYTHONPATH=.:kernels:controller:kernels/bench HF_HUB_OFFLINE=1
if [ "${1:-}" = --test ]; then
  export KERNEL_TEST_DEVICE=cuda
  exec "$here/venv/bin/python" -m pytest -c kernels/bench/pytest.ini --rootdir=. tests/kernels \\
    "${@:2}"
fi
exec "$here/venv/bin/python" -m moe_bench --out "$here/results" "$@"
"""
