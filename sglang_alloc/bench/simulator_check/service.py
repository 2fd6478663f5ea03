"""Simulator check: what steps took in service, from the server's own record of its forwards. Pure.

A bench times steps on an otherwise idle server. In service the same cores also receive requests,
detokenise and stream. A plant that is fitted to these times tells which part of an error comes from
the step times, and which from the model of the queue.
"""

from __future__ import annotations

import csv
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sglang_alloc.bench.simulator_check.fit import Case
from sglang_alloc.server_runs.served_steps import Step

# Sizes at which the fitted lines are written down; a plant joins them by straight lines again.
PREFILL_TOKENS = (128, 896, 2048)
DECODE_BATCHES = (1, 8)


def durations(steps: Iterable[Step]) -> Iterator[tuple[Step, float]]:
    """Yield each step with the time until the next one began.

    Left out is a decode step before a prefill step: the server may have been idle in between. After
    a prefill step there is always work, when answers are longer than a token.
    """
    for step, following in itertools.pairwise(steps):
        if (step.phase, following.phase) != ("decode", "prefill"):
            yield step, following.begun_seconds - step.begun_seconds


def fitted_times(steps: Iterable[Step], budgets: Sequence[int]) -> dict[Case, list[float]]:
    """Return seconds on a small grid, from least-squares lines over tokens for each budget.

    The mean of many steps is kept, the slow ones among them included, because queues grow with the
    mean. Raises ValueError when a budget has fewer than two sizes of a phase.
    """
    found: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    for step, seconds in durations(steps):
        found[step.phase, step.budget].append((step.tokens, seconds))
    times: dict[Case, list[float]] = {}
    for (phase, sizes), budget in itertools.product(
        (("prefill", PREFILL_TOKENS), ("decode", DECODE_BATCHES)), budgets
    ):
        points = found[phase, budget]
        if len({tokens for tokens, _ in points}) < 2:
            raise ValueError(f"{phase} steps of two sizes at budget {budget}; found {len(points)}")
        tokens_and_seconds = np.array(points, dtype=np.float64)
        slope, start = np.polyfit(tokens_and_seconds[:, 0], tokens_and_seconds[:, 1], deg=1)
        for size in sizes:
            times[Case(phase, size, budget)] = [float(start + slope * size)]
    return times


def write_times(path: Path, times: Mapping[Case, Sequence[float]]) -> None:
    """Write them in the columns that a plant is fitted to; prefill sizes are tokens already."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Case._fields, "median_ms", "prefill_prompt_tokens"])
        for case, (seconds,) in times.items():
            writer.writerow([*case, f"{1000 * seconds:.4f}", 1])
