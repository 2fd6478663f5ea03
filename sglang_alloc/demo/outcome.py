"""Demo, step 5: the numbers of one run, from what its requests felt. Pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from sglang_alloc.demo.load import RequestRecord
from sglang_alloc.demo.load_plan import BURST, Slo
from sglang_alloc.demo.observation import RunRecord
from sglang_alloc.demo.served import served_budgets, summarise_steps


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the smallest value that `percent` % do not exceed.

    It is always a value that was measured; NaN for no values.
    """
    if not values:
        return math.nan
    rank = max(1, math.ceil(percent / 100 * len(values)))
    return sorted(values)[rank - 1]


def within_slo(request: RequestRecord, slo: Slo) -> bool:
    """Tell whether a request kept both SLOs: its TTFT, and its mean inter-token latency.

    A request with an error kept none. One output token has no inter-token latency to miss.
    """
    if request.error is not None or request.ttft_seconds is None:
        return False
    itl_seconds = request.mean_itl_seconds
    itl_kept = itl_seconds is None or itl_seconds <= slo.itl_seconds
    return request.ttft_seconds <= slo.ttft_seconds and itl_kept


def attainment_ratio(requests: Sequence[RequestRecord], slo: Slo) -> float:
    """Return the share of `requests` within both SLOs; NaN for no requests."""
    if not requests:
        return math.nan
    return sum(within_slo(request, slo) for request in requests) / len(requests)


def budget_changes(run: RunRecord) -> int:
    """Return how often the acknowledged budgets changed during the run."""
    return max(0, len(run.budgets) - 1)


def served_per_second(run: RunRecord, phase: str) -> float:
    """Return the requests per second answered in full while `phase` lasted.

    Where more arrived than the server could answer, this is the machine's speed.
    """
    start, end = next(
        (start, end) for name, start, end in run.trace.phase_bounds() if name == phase
    )
    answered = [r for r in run.requests if r.error is None and start <= r.finished_second < end]
    return len(answered) / (end - start)


def summarise_run(run: RunRecord, slo: Slo) -> dict[str, Any]:
    """Return the numbers of one run under the names that report.json uses; seconds and ratios."""
    answered = [request for request in run.requests if request.ttft_seconds is not None]
    ttfts = [request.ttft_seconds for request in answered if request.ttft_seconds is not None]
    gaps = [gap for request in answered for gap in request.inter_token_seconds]
    queue = [sample.queue_requests for sample in run.gauges]
    served = served_budgets(run)
    return {
        "requests": len(run.requests),
        "errors": sum(request.error is not None for request in run.requests),
        "error_examples": sorted({r.error for r in run.requests if r.error is not None})[:5],
        "slo_attainment_ratio": attainment_ratio(run.requests, slo),
        "slo_attainment_ratio_by_phase": _by_phase(run, slo),
        "burst_served_requests_per_second": served_per_second(run, BURST),
        "ttft_seconds": _percentiles(ttfts),
        "itl_seconds": _percentiles(gaps),
        "queue_requests": {
            "mean": statistics.fmean(queue) if queue else math.nan,
            "max": max(queue, default=math.nan),
        },
        "throughput_tokens_per_second": sum(r.output_tokens for r in answered) / run.seconds,
        "prompt_tokens_per_second": sum(r.prompt_tokens for r in answered) / run.seconds,
        "mean_prefill_budget": _mean([(s.prefill_budget, s.prompt_tokens) for s in served]),
        "mean_decode_budget": _mean([(s.decode_budget, s.output_tokens) for s in served]),
        **summarise_steps(run.steps),
        "budget_changes": budget_changes(run),
        "seconds": run.seconds,
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": percentile(values, percent) for percent in (50, 95, 99)}


def _by_phase(run: RunRecord, slo: Slo) -> dict[str, float]:
    return {
        phase.name: attainment_ratio([r for r in run.requests if r.phase == phase.name], slo)
        for phase in run.trace.phases
    }


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    weight = sum(tokens for _, tokens in weighted)
    return sum(value * tokens for value, tokens in weighted) / weight if weight else math.nan
