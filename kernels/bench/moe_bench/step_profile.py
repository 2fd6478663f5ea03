"""Bench, where a served decode step's time goes: SGLang's own profiler, summed by kernel.

The profiler is CUPTI by way of torch: kernels take as long as without it, gaps between them may be
longer.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from sglang_alloc.server_runs.errors import ServerRunError

PROFILED_STEPS = 8
WRITTEN_SECONDS = 60.0
# Runs twice in every MoE layer, so that it counts the steps.
EXPERTS_KERNEL = "fused_moe_kernel"
WHOLE_STEP = "-"
COLUMNS = ("shape", "requests", "mode", "budget", "kernel", "calls", "us")


class KernelTime(NamedTuple):
    """A kernel of one step: how often it runs, and the microseconds of all its runs."""

    name: str
    calls: float
    microseconds: float


class StepProfile(NamedTuple):
    """One decode step: its kernels, the longest first, and the microseconds from step to step."""

    kernels: Sequence[KernelTime]
    microseconds: float


def profile_step(
    client: httpx2.Client, num_layers: int, decode: Callable[[int], object], folder: Path
) -> StepProfile:
    """Profile the decode steps of a server while `decode(tokens)` has it answer.

    num_layers: MoE layers. folder: where the server, on this machine, writes the trace. Raises
    ServerRunError when it does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("*DECODE*.json.gz"))
    asked = {
        "output_dir": str(folder),
        "num_steps": PROFILED_STEPS,
        "activities": ["GPU"],
        "profile_by_stage": True,
        "with_stack": False,
    }
    response = client.post("/start_profile", json=asked)
    if response.status_code != 200:
        raise ServerRunError(f"the profiler did not start: {response.text[:200]}")
    decode(PROFILED_STEPS + 8)
    deadline = time.monotonic() + WRITTEN_SECONDS
    while time.monotonic() < deadline:
        for path in set(folder.glob("*DECODE*.json.gz")) - before:
            try:
                return read_profile(path, num_layers)
            except (EOFError, json.JSONDecodeError):
                pass  # it is being written
        time.sleep(0.5)
    raise ServerRunError(f"the server wrote no trace of decode steps into {folder}")


def read_profile(path: Path, num_layers: int) -> StepProfile:
    """Sum a trace of decode steps by kernel.

    Raises ServerRunError where the experts' kernel is not in it.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return summed(
        (event for event in events if event.get("cat") in {"kernel", "gpu_memcpy", "gpu_memset"}),
        num_layers,
    )


def summed(events: Iterable[Mapping[str, Any]], num_layers: int) -> StepProfile:
    """Sum events with `name`, `ts` and `dur` in microseconds."""
    calls: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    ends = []
    begins = []
    for event in events:
        name = short_name(event["name"])
        calls[name] += 1
        spent[name] += event["dur"]
        begins.append(event["ts"])
        ends.append(event["ts"] + event["dur"])
    steps = calls[EXPERTS_KERNEL] / (2 * num_layers)
    if not steps:
        raise ServerRunError(
            f"the trace has no {EXPERTS_KERNEL}: SGLang's Triton experts did not run"
        )
    kernels = [KernelTime(name, calls[name] / steps, spent[name] / steps) for name in calls]
    kernels = [kernel for kernel in kernels if kernel.calls]
    kernels.sort(key=lambda kernel: -kernel.microseconds)
    return StepProfile(kernels, (max(ends) - min(begins)) / steps)


def short_name(name: str) -> str:
    """Return a kernel's name without return type, template and call arguments."""
    bare = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", bare, maxsplit=1)[0].strip()


class ProfileCsv(NamedTuple):
    """A CSV of profiles, and the columns that say on what they were measured."""

    path: Path
    machine: Mapping[str, str]

    def append(self, names: Sequence[object], profile: StepProfile) -> None:
        """Add a profile's rows; kernel `-` is the whole step. names: the first four columns."""
        is_new = not self.path.exists()
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow([*COLUMNS, *self.machine])
            whole = KernelTime(WHOLE_STEP, 1.0, profile.microseconds)
            for name, calls, us in (whole, *profile.kernels):
                writer.writerow([*names, name, f"{calls:.3g}", f"{us:.2f}", *self.machine.values()])
