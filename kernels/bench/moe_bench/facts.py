"""Bench, what a figure was measured on, and why a machine without a GPU is refused."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import torch

from sglang_alloc.errors import AllocError
from sglang_alloc.server_runs.machine import cpu_model, source_commit, today_utc

PROC_CPUINFO = "/proc/cpuinfo"
# Only in a bundle, which is no clone: its maker's commit.
COMMIT = Path(__file__).parents[3] / "COMMIT"


class NoGpuError(AllocError):
    """A bench for GPUs was asked for on a machine that cannot run it."""


def require_gpu(*, serves: bool) -> None:
    """Raise `NoGpuError` naming what is missing: a driver, a CUDA build of torch, or SGLang.

    serves: whether servers are started too, which find the plugin only where we are installed.
    """
    missing = []
    driver = driver_version()
    if driver == "-":
        missing.append("an NVIDIA GPU with its driver (nvidia-smi does not answer)")
    if torch.version.cuda is None:
        missing.append(f"a CUDA build of torch (found {torch.__version__})")
    elif not torch.cuda.is_available():
        missing.append(f"a driver that CUDA {torch.version.cuda} of this torch can use")
    if version_of("sglang") == "-":
        missing.append("SGLang in this Python environment")
    if serves and version_of("sglang-alloc") == "-":
        missing.append(
            "this project in this Python environment, which `--kinds server` needs (`pip install "
            "--no-deps .`, or leave that kind out)"
        )
    if missing:
        raise NoGpuError(
            "The GPU bench was asked for, and this machine lacks "
            + "; ".join(missing)
            + ". Run it where these are; without a network, kernels/bench/offline_bundle.py packs "
            "what such a machine needs. `make bench` runs the part that a CPU can."
        )


def machine_columns(device: torch.device) -> dict[str, str]:
    """Return the columns that say on what a row was measured."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_model_name(),
        "driver": driver_version() if on_gpu else "-",
        "cuda": torch.version.cuda or "-",
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "sglang": version_of("sglang"),
        "commit": commit(),
        "date": today_utc(),
    }


def commit() -> str:
    """Return the commit of this source, from git or as the bundle's maker noted it."""
    if COMMIT.exists():
        return COMMIT.read_text(encoding="utf-8").strip()
    return source_commit()


def cpu_model_name() -> str:
    """Return the processor's name."""
    return cpu_model(Path(PROC_CPUINFO))


def driver_version() -> str:
    """Return the GPU driver's version, or `-`."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "-"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "-"


def version_of(package: str) -> str:
    """Return an installed package's version, or `-`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"
