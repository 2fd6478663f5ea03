"""Simulator, last step: a run as some hundred points, for plots. Pure."""

from bisect import bisect_right
from typing import NamedTuple

from sglang_alloc_controller.settings import SloSettings
from sglang_alloc_controller.simulator.run_law import Run
from sglang_alloc_controller.simulator.scores import within_slo

_POINTS = 240


class Timeline(NamedTuple):
    """Columns of equal length; what is said of an interval stands at its middle."""

    seconds: list[float]
    prefill_budget: list[int]
    decode_budget: list[int]
    calm_prefill_budget: list[int]
    """Of calm steps; the same where the law makes no difference."""
    calm_decode_budget: list[int]
    queue_requests: list[int]
    """Largest in the interval."""
    arrivals_per_second: list[float]
    attainment_ratio: list[float | None]
    """Of the requests that arrived in the interval; None: none did."""


def timeline(run: Run, slo: SloSettings, points: int = _POINTS) -> Timeline:
    """Return a run cut into `points` intervals of equal length."""
    width = run.end_seconds / points
    queues, arrivals, kept = [0] * points, [0] * points, [0] * points
    for second, queue in run.queue:
        interval = min(points - 1, int(second / width))
        queues[interval] = max(queues[interval], queue)
    for outcome in run.outcomes:
        arrival = run.workload.arrival_seconds[outcome.request]
        interval = min(points - 1, int(arrival / width))
        arrivals[interval] += 1
        kept[interval] += within_slo(outcome, slo)
    middles = [(interval + 0.5) * width for interval in range(points)]
    starts = [change.seconds for change in run.changes]
    changes = [run.changes[bisect_right(starts, middle) - 1] for middle in middles]
    return Timeline(
        [round(middle, 3) for middle in middles],
        [change.budgets[0] for change in changes],
        [change.budgets[1] for change in changes],
        [(change.calm or change.budgets)[0] for change in changes],
        [(change.calm or change.budgets)[1] for change in changes],
        queues,
        [round(count / width, 4) for count in arrivals],
        [
            round(good / count, 4) if count else None
            for good, count in zip(kept, arrivals, strict=True)
        ],
    )
