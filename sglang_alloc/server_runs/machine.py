"""What a figure was measured on: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

VERSIONED = ("sglang-alloc", "sglang", "torch", "transformers", "numpy")


def machine_facts() -> dict[str, object]:
    """Return processor, usable cores, memory and system of this machine."""
    return {
        "cpu_model": cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": system_name(platform.system(), platform.release(), platform.machine()),
    }


def system_name(system: str, release: str, architecture: str) -> str:
    """Return the kernel's name, version numbers and architecture, without the name of its build."""
    version = re.match(r"[\d.]*\d", release)
    return "-".join((system, version[0] if version else "unknown", architecture))


def cpu_model(cpuinfo: Path) -> str:
    """Return the processor's name from /proc/cpuinfo, or the architecture where it has none."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def software_versions() -> dict[str, str]:
    """Return the versions that decide the figures; a package that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def source_commit(folder: Path = Path(__file__).parent) -> str:
    """Return the commit of the clone that this runs from, with `+` for local changes, or `-`."""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "-"


def today_utc() -> str:
    """Return the date, as a figure's reader needs it."""
    return datetime.now(timezone.utc).date().isoformat()


def gpu_facts(*, on_cpu: bool) -> dict[str, str]:
    """Return name and driver of the GPUs, and torch's CUDA; each `-` on a CPU or where unknown."""
    if on_cpu:
        return dict.fromkeys(("gpu", "driver", "cuda"), "-")
    import torch  # takes seconds; here it opens no GPU

    names, drivers = _nvidia_smi("name"), _nvidia_smi("driver_version")
    return {
        "gpu": " + ".join(dict.fromkeys(names)) or "-",
        "driver": " + ".join(dict.fromkeys(drivers)) or "-",
        "cuda": torch.version.cuda or "-",
    }


def _nvidia_smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def row_facts() -> dict[str, object]:
    """Return what every row of a bench's CSV says of where and with what it was measured."""
    facts, versions = machine_facts(), software_versions()
    return {
        "cpu_model": facts["cpu_model"],
        "cores": facts["cores"],
        **{name: versions.get(name, "-") for name in ("sglang-alloc", "sglang", "torch")},
        "commit": source_commit(),
        "date": today_utc(),
    }
