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
`run.sh --test` runs the tests of kernels and servers. Results are in `results/moe-cuda.csv`; a run
that was cut goes on when it is started again.

SGLang runs here with `--attention-backend triton --sampling-backend pytorch`: it imports FlashInfer
and uses nothing of it. Of its kernel wheel only the Python files and the binary for {architecture}
are here. It compiles small kernels when they are first used: nvcc is here (`cuda` is a folder of
links to it and to torch's CUDA, used where the machine has no nvcc), and g++ has to be there.

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
"$here/venv/bin/python" -m pip install --no-index --no-deps --ignore-installed "$here"/wheels/*.whl
# One folder with all parts of CUDA, some of which came with torch and some in the bundle.
"$here/venv/bin/python" - "$here/cuda" <<'END'
import pathlib
import sys

target = pathlib.Path(sys.argv[1])
for root in (path for entry in sys.path for path in pathlib.Path(entry).glob("nvidia/cu[0-9]*")):
    for source in (path for path in root.rglob("*") if path.is_file()):
        link = target / source.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(source)
(target / "lib").mkdir(parents=True, exist_ok=True)
links = {"lib64": "lib"} | {"lib/libcudart.so": p.name for p in target.glob("lib/libcudart.so.*")}
for link, source in links.items():
    if not (target / link).is_symlink():
        (target / link).symlink_to(source)
END
command -v g++ >/dev/null || echo "install.sh: g++ is not there, and servers will need it" >&2
"$here/venv/bin/python" -c 'import sglang, sglang_alloc, torch; print(torch.cuda.get_device_name())'
"""

RUN = """\
#!/usr/bin/env bash
# Run the bench (its options pass through), or with --test the tests of kernels and servers.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/source"
export PYTHONPATH=.:kernels:controller:kernels/bench HF_HUB_OFFLINE=1 PATH="$here/venv/bin:$PATH"
if [ -z "${CUDA_HOME:-}" ] && ! command -v nvcc >/dev/null; then export CUDA_HOME="$here/cuda"; fi
if [ "${1:-}" = --test ]; then
  export KERNEL_TEST_DEVICE=cuda
  exec "$here/venv/bin/python" -m pytest -c kernels/bench/pytest.ini --rootdir=. \\
    tests/kernels tests/gpu "${@:2}"
fi
exec "$here/venv/bin/python" -m moe_bench --out "$here/results" "$@"
"""
