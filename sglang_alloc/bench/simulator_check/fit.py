"""Simulator check, first step: a short bench of the running server, as the CSV that fits a plant.

It differs from `sglang-alloc bench` in that it decodes behind prompts as long as the trace's:
attention to a long prompt is part of what a step costs.
"""

from __future__ import annotations

import csv
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx2

from sglang_alloc.bench.timing import generate
from sglang_alloc.demo.trace import cut_prompt
from sglang_alloc.server_runs.budget_override import BudgetOverride

# Prompts in one prefill step: two of the demo's fit into its chunk of 2048 tokens.
PREFILL_CONCURRENCIES = (1, 2)
DECODE_CONCURRENCIES = (1, 2, 4, 8)
DECODE_STEPS = 16


class Case(NamedTuple):
    """One kind of batch at one budget."""

    phase: str
    concurrency: int
    budget: int


class StepBench:
    """Times steps of one server at budgets that it puts in force itself."""

    def __init__(
        self,
        client: httpx2.Client,
        override: BudgetOverride,
        texts: Sequence[str],
        prompt_bytes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take prompts of `prompt_bytes` from `texts`."""
        self._client, self._override = client, override
        self._texts, self._prompt_bytes, self._clock = texts, prompt_bytes, clock
        self.seconds: dict[Case, list[float]] = defaultdict(list)

    def run_round(self, budgets: Sequence[int], seed: int) -> None:
        """Time every case once; each budget gets prompts of its own."""
        generator = random.Random(seed)
        for budget in budgets:
            self._override.set(budget, budget)
            self._batch_seconds(1, 4, generator)  # the first batch after a change is not measured
            for concurrency in PREFILL_CONCURRENCIES:
                seconds = self._batch_seconds(concurrency, 1, generator)
                self.seconds[Case("prefill", concurrency, budget)].append(seconds)
            for concurrency in DECODE_CONCURRENCIES:
                short = self._batch_seconds(concurrency, 1, generator)
                long = self._batch_seconds(concurrency, 1 + DECODE_STEPS, generator)
                step = (long - short) / DECODE_STEPS
                self.seconds[Case("decode", concurrency, budget)].append(step)

    def _batch_seconds(self, concurrency: int, tokens: int, generator: random.Random) -> float:
        prompts = [
            cut_prompt(generator.choice(self._texts), self._prompt_bytes, generator)
            for _ in range(concurrency)
        ]
        started = self._clock()
        generate(self._client, prompts, tokens)
        return self._clock() - started


def write_bench(
    path: Path,
    seconds: Mapping[Case, Sequence[float]],
    prompt_bytes: int,
    facts: Mapping[str, object],
) -> None:
    """Write the medians in the columns of `sglang-alloc bench`, those of stock left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [*Case._fields, "rounds", "median_ms", "low_ms", "high_ms",
             "prefill_prompt_tokens", "decode_prompt_tokens", "decode_steps", *facts]
        )  # fmt: skip
        for case, values in seconds.items():
            figures = (statistics.median(values), min(values), max(values))
            writer.writerow(
                [*case, len(values), *(f"{1000 * one:.4f}" for one in figures),
                 prompt_bytes, prompt_bytes, DECODE_STEPS, *facts.values()]
            )  # fmt: skip
