"""Demo, step 2: from this machine's measured capacity to the arrival rates and the SLOs."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from sglang_alloc.demo.calibration import ClosedLoop
from sglang_alloc.demo.trace import LoadPhase
from sglang_alloc.server_runs.errors import ServerRunError

# Two calm stretches around a burst; the last is long enough to see quality come back.
CALM_SECONDS, BURST_SECONDS, AFTER_SECONDS = 10.0, 40.0, 30.0
BURST = "burst"
# Calm leaves half of the capacity free, so that full quality meets its SLOs there.
CALM_UTILISATION_RATIO = 0.5
# The burst lies this far between the capacities at full and at floor: full quality cannot follow,
# the floor can, and has some left to work off what piled up before the controller acted. Less than
# half-way, because arrivals one by one are prefilled one by one: at the floor, a server that closed
# loops drove to 8.9 requests/s carried no more than 7 to 7.7 of them.
BURST_POSITION_RATIO = 0.45
# Where the floor gains next to nothing, the burst still overloads full quality by this much, and
# anywhere by so much that its queue outgrows the TTFT SLO when this share of the burst is over.
BURST_OVERLOAD_MIN_RATIO, KEPT_SHARE_RATIO = 1.12, 0.45
# A shared machine may be faster in the run than when it was measured. A burst of which full quality
# keeps at least this share within the SLOs is no overload: it is raised by the same rule from what
# full quality served in it, and by so much at least.
CARRIED_ATTAINMENT_RATIO, RAISED_BURST_RATIO = 0.6, 1.12
# An SLO is this many times what a request gets in a full batch without a queue.
TTFT_SLACK_RATIO, ITL_SLACK_RATIO = 4.0, 4.0

# Edges of SGLang's latency histograms, ten per decade as in the R10 series: an SLO must be an edge,
# because only then does the histogram say exactly how many requests kept it.
_R10 = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0)


def _edges(first_decade: int, decades: int) -> tuple[float, ...]:
    exponents = range(first_decade, first_decade + decades)
    return tuple(float(f"{step}e{exponent}") for exponent in exponents for step in _R10)


TTFT_EDGES_SECONDS = _edges(-2, 4)  # 10 ms to 80 s
ITL_EDGES_SECONDS = _edges(-3, 4)  # 1 ms to 8 s


class Slo(NamedTuple):
    """What a request is promised; both latencies are edges of SGLang's histograms."""

    ttft_seconds: float
    itl_seconds: float


class CarriedBurst(NamedTuple):
    """A burst that was raised, since full quality kept `attainment_ratio` of it within the SLOs."""

    requests_per_second: float
    attainment_ratio: float


class LoadPlan(NamedTuple):
    """The load that fits this machine, and the measurements that it was derived from."""

    phases: tuple[LoadPhase, ...]
    slo: Slo
    idle: ClosedLoop
    full: ClosedLoop
    one_below: ClosedLoop
    floor: ClosedLoop
    carried: tuple[CarriedBurst, ...] = ()
    """The bursts that were tried first, in order."""

    @property
    def burst_per_second(self) -> float:
        """Arrivals per second in the burst."""
        return next(phase.requests_per_second for phase in self.phases if phase.name == BURST)

    def raised(self, attainment_ratio: float, served_per_second: float) -> LoadPlan:
        """Return the plan with a heavier burst, as full quality kept and served so much of it."""
        burst_per_second = max(
            overloading_rate(served_per_second, self.slo),
            RAISED_BURST_RATIO * self.burst_per_second,
        )
        phases = tuple(
            phase._replace(requests_per_second=burst_per_second) if phase.name == BURST else phase
            for phase in self.phases
        )
        tried = CarriedBurst(self.burst_per_second, attainment_ratio)
        return self._replace(phases=phases, carried=(*self.carried, tried))


def plan_load(
    idle: ClosedLoop, full: ClosedLoop, one_below: ClosedLoop, floor: ClosedLoop
) -> LoadPlan:
    """Derive rates and SLOs.

    `idle` is one client at full budget, `full` and `floor` a full batch at full budget and at the
    smallest budget that the controller may use; `one_below`, one activation below full, is only
    reported: there our code computes the experts and spares next to none of them. Calm arrives at
    half of the full capacity, the burst a little less than half-way between full and floor, or
    higher where that would not make full quality miss its SLO.

    Raises:
        ServerRunError: an SLO would lie above the largest edge: the machine is too slow or busy.
    """
    slo = Slo(
        ttft_seconds=next_edge(TTFT_SLACK_RATIO * full.median_ttft_seconds, TTFT_EDGES_SECONDS),
        itl_seconds=next_edge(ITL_SLACK_RATIO * full.mean_itl_seconds, ITL_EDGES_SECONDS),
    )
    capacity = full.requests_per_second
    between = capacity + BURST_POSITION_RATIO * (floor.requests_per_second - capacity)
    overload = max(BURST_OVERLOAD_MIN_RATIO * capacity, overloading_rate(capacity, slo))
    burst = max(between, overload)
    calm = CALM_UTILISATION_RATIO * capacity
    phases = (
        LoadPhase("calm", CALM_SECONDS, calm),
        LoadPhase(BURST, BURST_SECONDS, burst),
        LoadPhase("calm again", AFTER_SECONDS, calm),
    )
    return LoadPlan(phases, slo, idle, full, one_below, floor)


def overloading_rate(served_per_second: float, slo: Slo) -> float:
    """Return the arrivals per second that make a server miss the TTFT SLO early in the burst.

    While r arrive and c are served per second, a request that comes t seconds after the start of
    the burst waits t (r / c - 1) seconds: the SLO, at t = KEPT_SHARE_RATIO of the burst.
    """
    return served_per_second * (1 + slo.ttft_seconds / (KEPT_SHARE_RATIO * BURST_SECONDS))


def next_edge(seconds: float, edges: Sequence[float]) -> float:
    """Return the smallest edge at or above `seconds`."""
    position = bisect.bisect_left(edges, seconds)
    if position == len(edges):
        raise ServerRunError(
            f"calibration asks for an SLO of {seconds:.3g} s, above the largest that the demo "
            f"offers ({edges[-1]:g} s): this machine is too slow or too busy, stop other work first"
        )
    return edges[position]


def bucket_arguments() -> list[str]:
    """Return SGLang's flags that put every possible SLO on a bucket edge."""
    ttft = [f"{edge:g}" for edge in TTFT_EDGES_SECONDS]
    itl = [f"{edge:g}" for edge in ITL_EDGES_SECONDS]
    return ["--bucket-time-to-first-token", *ttft, "--bucket-inter-token-latency", *itl]
