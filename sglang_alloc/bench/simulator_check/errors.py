"""Simulator check, last step: how far the simulated run is from the served one. Pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sglang_alloc.allocation_mode import PHASES
from sglang_alloc.bench.simulator_check.felt import Felt, Run, Served
from sglang_alloc.demo.outcome import percentile

WHOLE = "whole trace"
_PERCENTS = (50, 95)


class Error(NamedTuple):
    """One figure of a run, as served and as simulated."""

    run: str
    phase: str
    """A phase of the trace by its arrivals, or the whole trace."""
    measure: str
    """With its unit; a queue is in requests."""
    requests: int
    served: float
    simulated: float

    @property
    def difference(self) -> float:
        """Simulated less served, in the measure's unit."""
        return self.simulated - self.served

    @property
    def error_ratio(self) -> float:
        """Simulated over served, less one; NaN where nothing was served to compare with."""
        return self.simulated / self.served - 1 if self.served else math.nan


def compare(served: Served, run: Run, simulated: Run) -> list[Error]:
    """Return the errors of p50 and p95 of TTFT and ITL by phase, of the queue and the budgets.

    Budgets are means over the tokens that were computed with them.

    Raises ValueError when the two runs are not of the same requests.
    """
    phases = [WHOLE, *(name for name, _, _ in served.phases)]
    errors = [one for phase in phases for one in _latencies(served, run, simulated, phase)]
    end = served.phases[-1][2]
    errors += _queue(run, simulated, len(served.requests), end)
    errors += _without_token(served, run, simulated, end)
    errors += _computed(run, simulated, len(served.requests))
    return errors


def _latencies(served: Served, run: Run, simulated: Run, phase: str) -> Iterator[Error]:
    pairs = list(zip(served.requests, run.felt, simulated.felt, strict=True))
    chosen = [(mine, theirs) for request, mine, theirs in pairs if phase in (WHOLE, request.phase)]
    for name in Felt._fields:
        real, model = (
            [
                value
                for value in (getattr(one[side], name) for one in chosen)
                if not math.isnan(value)
            ]
            for side in (0, 1)
        )
        for percent in _PERCENTS:
            yield Error(
                run.name, phase, f"{name.split('_')[0]}_p{percent}_seconds", len(chosen),
                percentile(real, percent), percentile(model, percent),
            )  # fmt: skip


def _queue(run: Run, simulated: Run, requests: int, end: float) -> Iterator[Error]:
    real, model = (
        [waiting for second, waiting in one.queue if second <= end] for one in (run, simulated)
    )
    for percent in _PERCENTS:
        yield Error(
            run.name, WHOLE, f"queue_p{percent}_requests", requests,
            percentile(real, percent), percentile(model, percent),
        )  # fmt: skip
    yield Error(run.name, WHOLE, "queue_mean_requests", requests, _mean(real), _mean(model))


def _without_token(served: Served, run: Run, simulated: Run, end: float) -> Iterator[Error]:
    """Yield the requests that are due and have no first token yet, looked at every second.

    Unlike the server's gauge, which it sets between two steps, this is exact on both sides.
    """
    real, model = (
        [waiting_at(served, one, second) for second in range(round(end))]
        for one in (run, simulated)
    )
    for percent in _PERCENTS:
        yield Error(
            run.name, WHOLE, f"unanswered_p{percent}_requests", len(served.requests),
            percentile(real, percent), percentile(model, percent),
        )  # fmt: skip
    name = "unanswered_mean_requests"
    yield Error(run.name, WHOLE, name, len(served.requests), _mean(real), _mean(model))


def waiting_at(served: Served, run: Run, second: float) -> int:
    """Return how many requests are due at `second` and have no first token yet."""
    return sum(
        request.due_second <= second < request.due_second + felt.ttft_seconds
        for request, felt in zip(served.requests, run.felt, strict=True)
    )


def _computed(run: Run, simulated: Run, requests: int) -> Iterator[Error]:
    """Yield what tokens were computed with, in steps of both kinds."""
    for phase in PHASES:
        real, model = (
            one.prefill if phase == "prefill" else one.decode for one in (run, simulated)
        )
        for name, served, twin in (
            ("budget_mean_activations", real.mean_budget, model.mean_budget),
            ("calm_tokens_ratio", real.calm_ratio, model.calm_ratio),
        ):
            yield Error(run.name, WHOLE, f"{phase}_{name}", requests, served, twin)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
