"""Bench, the clock: how long a piece of device work takes, replayed as a CUDA graph on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds per call over the repeats: the median, and the 10 % and 90 % points."""

    median: float
    low: float
    high: float


class Timer:
    """Times calls of a function; `repeats` measurements of at least `window_seconds` each.

    On a GPU the function is captured into a CUDA graph and replayed, as SGLang does with its decode
    steps, so that what the host does costs nothing; `graphs` False times it as it is called.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        repeats: int = 15,
        window_seconds: float = 0.01,
        graphs: bool = True,
    ) -> None:
        self._device = device
        self._repeats = repeats
        self._window_seconds = window_seconds
        self._graphs = graphs and device.type == "cuda"

    def seconds(self, call: Callable[[], object]) -> Timing:
        """Return how long a call takes once it is warm."""
        for _ in range(3):
            call()
        run = self._captured(call) if self._graphs else call
        run()
        calls = self._calls_per_window(run)
        times = sorted(self._elapsed(run, calls) / calls for _ in range(self._repeats))
        tenth = len(times) // 10
        return Timing(statistics.median(times), times[tenth], times[-1 - tenth])

    def _captured(self, call: Callable[[], object]) -> Callable[[], object]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def _calls_per_window(self, run: Callable[[], object]) -> int:
        once = max(self._elapsed(run, 1), 1e-7)
        return max(1, min(1000, round(self._window_seconds / once)))

    def _elapsed(self, run: Callable[[], object], calls: int) -> float:
        if self._device.type != "cuda":
            started = time.perf_counter()
            for _ in range(calls):
                run()
            return time.perf_counter() - started
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
