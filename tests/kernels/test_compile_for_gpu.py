"""Every kernel compiles for a GPU, on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels" / "sglang_alloc_kernels"


def test_every_kernel_compiles_for_a_gpu() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_for_gpu.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    compiled = {line.partition(":")[0] for line in done.stdout.splitlines()}
    sources = [path.read_text().splitlines() for path in KERNELS.glob("*.py")]
    written = {
        line.removeprefix("def ").partition("(")[0]
        for source in sources
        for line in source
        if line.startswith("def _") and line.partition("(")[0].endswith("_kernel")
    }
    assert compiled == written
