"""Simulator, fourth step: loads and faults by name, at rates that fit the plant. Pure."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sglang_alloc_controller.simulator.workload import (
    Burstiness,
    Rate,
    RequestMix,
    Workload,
    markov_rate,
    poisson_workload,
)

_MINUTE, _HOUR = 60.0, 3600.0


class Capacities(NamedTuple):
    """Largest Poisson rates, in requests per second, that keep the SLOs at fixed budgets."""

    full: float
    floor: float

    def at(self, share: float) -> float:
        """Return a rate: 0 is none, 1 the capacity at full, 2 that at the floor."""
        if share <= 1:
            return share * self.full
        return self.full + (share - 1) * (self.floor - self.full)


@dataclass(frozen=True)
class Faults:
    """What is wrong with the metrics, and when; seconds of simulated time."""

    poll_seconds: float = 1.0
    delay_seconds: float = 0.0
    """Age of a reading when it arrives."""
    failing_ratio: float = 0.0
    """Share of the readings that fail or are rejected as garbled."""
    outages: tuple[tuple[float, float], ...] = ()
    """(from, to) without any reading."""
    tells_steps: bool = True
    """Whether the readings have the engine's own step times: a Prometheus server does not."""
    wrong_queue_ratio: float = 0.0
    """Share of the readings whose queue gauge is absurd."""


@dataclass(frozen=True)
class Scenario:
    """A load on one server, and what goes wrong meanwhile."""

    name: str
    seconds: float
    rate: Callable[[Capacities, int], Rate]
    """Arrival rate by capacities and seed."""
    peak: float
    """Highest rate, as a share in the sense of `Capacities.at`."""
    mix: Callable[[RequestMix, float], RequestMix] = lambda mix, second: mix
    slowdown: Callable[[float], float] = lambda second: 1.0
    restarts: tuple[tuple[float, float], ...] = ()
    """(from, to) without an engine."""
    faults: Faults = Faults()
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """What an operator of this deployment would set apart from the defaults."""
    feasible: bool = True
    """Whether some budget can keep the SLOs; the bar is judged on those only."""
    disturbed_at_seconds: float | None = None
    """When the load jumps, for settling time and overshoot."""
    constant: bool = False
    """Whether the load stays as it is, so that the budgets should come to rest."""

    def workload(self, mix: RequestMix, capacities: Capacities, seed: int) -> Workload:
        """Draw the requests."""
        return poisson_workload(
            self.rate(capacities, seed),
            capacities.at(self.peak) * 1.0001,
            self.seconds,
            lambda second: self.mix(mix, second),
            seed,
        )


def _steps(*levels: tuple[float, float]) -> Callable[[Capacities, int], Rate]:
    """Return a rate that is `share` from `second` on, for each (second, share)."""

    def rate(capacities: Capacities, seed: int) -> Rate:
        rates = [(second, capacities.at(share)) for second, share in levels]
        return lambda now: next(value for second, value in reversed(rates) if second <= now)

    return rate


def _curve(share_at: Callable[[float], float]) -> Callable[[Capacities, int], Rate]:
    def rate(capacities: Capacities, seed: int) -> Rate:
        return lambda now: capacities.at(share_at(now))

    return rate


def _bursty(capacities: Capacities, seed: int) -> Rate:
    levels = Burstiness(capacities.at(0.6), capacities.at(1.6), 180.0, 60.0)
    return markov_rate(levels, _HOUR, seed)


def _ramp(now: float) -> float:
    """Half an hour up, as long down."""
    half = 30 * _MINUTE
    return 0.4 + 1.2 * (1 - abs(now - half) / half)


def _day(now: float) -> float:
    """A day with its peak at noon, three quarters of the way from full to floor capacity."""
    return 1.0 + 0.75 * -math.cos(2 * math.pi * now / (24 * _HOUR))


def _flood(mix: RequestMix, second: float) -> RequestMix:
    """Prompts four times as long for ten minutes."""
    if 10 * _MINUTE <= second < 20 * _MINUTE:
        return mix._replace(prompt_tokens=4 * mix.prompt_tokens)
    return mix


def _throttled(now: float) -> float:
    """Step times over the bench's: a clock at two thirds for a quarter of an hour."""
    return 1.5 if 10 * _MINUTE <= now < 25 * _MINUTE else 1.0


_BURST = _steps((0.0, 0.5), (10 * _MINUTE, 1.6), (25 * _MINUTE, 0.5))
_SLOW_SCRAPES: Mapping[str, Mapping[str, object]] = {
    "source": {"kind": "prometheus", "poll_seconds": 5.0, "timeout_seconds": 4.0},
    "freshness": {"stale_after_seconds": 15.0},
    "law": {"dead_time_seconds": 3.0},
}

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("step", 40 * _MINUTE, _BURST, 1.6, disturbed_at_seconds=10 * _MINUTE),
    Scenario("ramp", _HOUR, _curve(_ramp), 1.6),
    Scenario("diurnal", 24 * _HOUR, _curve(_day), 1.75),
    Scenario("bursty", _HOUR, _bursty, 1.6),
    Scenario("long-prompts", 30 * _MINUTE, _steps((0.0, 0.42)), 0.42, mix=_flood,
             disturbed_at_seconds=10 * _MINUTE),
    Scenario("drift", _HOUR, _steps((0.0, 0.9)), 0.9,
             slowdown=lambda now: 1.0 + 0.15 * now / _HOUR),
    Scenario("throttled", 40 * _MINUTE, _steps((0.0, 0.8)), 0.8, slowdown=_throttled,
             disturbed_at_seconds=10 * _MINUTE),
    Scenario("replica-lost", 40 * _MINUTE,
             _steps((0.0, 1.0), (10 * _MINUTE, 1.5), (20 * _MINUTE, 1.0)), 1.5,
             disturbed_at_seconds=10 * _MINUTE),
    Scenario("metrics-delayed", 40 * _MINUTE, _BURST, 1.6,
             faults=Faults(poll_seconds=5.0, delay_seconds=3.0, tells_steps=False),
             settings=_SLOW_SCRAPES),
    Scenario("metrics-dropped", 40 * _MINUTE, _BURST, 1.6,
             faults=Faults(failing_ratio=0.3, outages=((15 * _MINUTE, 16 * _MINUTE),))),
    Scenario("metrics-garbled", 40 * _MINUTE, _BURST, 1.6,
             faults=Faults(failing_ratio=0.2, wrong_queue_ratio=0.02)),
    Scenario("engine-restart", 40 * _MINUTE, _BURST, 1.6,
             restarts=((15 * _MINUTE, 15.5 * _MINUTE),)),
    Scenario("constant-low", _HOUR, _steps((0.0, 0.5)), 0.5, constant=True),
    Scenario("constant-near", _HOUR, _steps((0.0, 0.95)), 0.95, constant=True),
    Scenario("constant-over", _HOUR, _steps((0.0, 1.4)), 1.4, constant=True),
    Scenario("infeasible", 30 * _MINUTE, _steps((0.0, 0.5), (5 * _MINUTE, 3.0)), 3.0,
             feasible=False),
)  # fmt: skip


def named(name: str) -> Scenario:
    """Return a scenario by name; KeyError: there is none."""
    return {scenario.name: scenario for scenario in SCENARIOS}[name]
