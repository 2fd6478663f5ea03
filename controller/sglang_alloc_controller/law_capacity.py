"""Control story, third step, forward: which budgets carry a load, and what the SLO allows. Pure.

A request takes of the engine's time, at the levels i of prefill and j of decode,

    work = prompt tokens * seconds per prefill token(i) + tokens * decode step(j, b) / b

where b is the largest batch that was seen: what a decode step costs each of its requests when the
engine is busy. Utilisation is rate * work. On a simulated server the SLO breaks at the same
utilisation whatever the budgets are (docs/simulator.md), so one number is learned: the critical
utilisation c, at which exactly the allowed share of events misses the SLO. Misses grow by a factor
of e for each 1/`load_slope` of utilisation:

    by load  = allowed share * exp(load_slope * (utilisation - c)) * requests
    expected = by load + allowed share * load_stray_ratio * requests

where strays are answers that would be late on an idle server too. c follows the counted misses k of
each reading as the mean of a Poisson count with a normal prior does:

    precision += slope^2 * by load^2 / expected / dispersion
    c         += slope * by load * (1 - k / expected) / dispersion / precision

Misses come in clumps, hence the dispersion; old evidence fades, because servers change.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.law_load import Load
from sglang_alloc_controller.samples import Phase
from sglang_alloc_controller.settings import LawSettings

# c may move by this at once: one clump of late answers is no other server.
_STEP_MAX = 0.01
_BOUNDS = (0.1, 2.0)


class Levels(NamedTuple):
    """Levels of both phases; 0 is the floor."""

    prefill: int
    decode: int


class Choice(NamedTuple):
    """A pair of levels and what it costs."""

    levels: Levels
    loss: float
    """Nats per token, of both phases."""
    work_seconds: float
    """Of the engine's time, per request."""


class Critical(NamedTuple):
    """The learned critical utilisation, and how sure it is."""

    utilisation: float
    precision: float


def prior(law: LawSettings) -> Critical:
    """Return what is believed before anything was seen."""
    return Critical(law.load_critical_prior, _prior_precision(law))


def learned_from(
    critical: Critical,
    *,
    utilisation: float,
    requests: float,
    missed_ratio: float,
    seconds: float,
    objective_ratio: float,
    law: LawSettings,
) -> Critical:
    """Return the belief after `seconds` at this utilisation with so many requests and misses."""
    slope, dispersion = law.load_slope, law.load_dispersion
    kept = critical.precision * math.exp(-seconds / law.load_memory_seconds)
    precision = max(_prior_precision(law), kept)
    allowed = 1.0 - objective_ratio
    share = allowed * math.exp(min(50.0, slope * (utilisation - critical.utilisation)))
    if share >= 1.0 or requests <= 0:
        return critical._replace(precision=precision)  # far beyond: everything misses, as expected
    by_load, counted = share * requests, missed_ratio * requests
    expected = by_load + allowed * law.load_stray_ratio * requests
    precision += slope**2 * by_load**2 / expected / dispersion
    step = slope * by_load * (1.0 - counted / expected) / dispersion / precision
    moved = critical.utilisation + min(_STEP_MAX, max(-_STEP_MAX, step))
    return Critical(min(_BOUNDS[1], max(_BOUNDS[0], moved)), precision)


def choices(
    load: Load, ranges: Mapping[Phase, BudgetRange], batch: float, law: LawSettings
) -> list[Choice]:
    """Return the pairs of levels worth taking: the smallest loss first, each faster than before."""
    prefill, decode = ranges["prefill"], ranges["decode"]
    prefill_seconds = [
        load.prefill_tokens * seconds / law.cost_prefill_tokens for seconds in prefill.seconds
    ]
    decode_seconds = [
        load.decode_tokens * decode.step_seconds(level, batch) / batch
        for level in range(len(decode.levels))
    ]
    every = sorted(
        (prefill.losses[i] + decode.losses[j], before + after, Levels(i, j))
        for i, before in enumerate(prefill_seconds)
        for j, after in enumerate(decode_seconds)
    )
    worth: list[Choice] = []
    for loss, work_seconds, levels in every:
        if not worth or work_seconds < worth[-1].work_seconds:
            worth.append(Choice(levels, loss, work_seconds))
    return worth


def work_of(
    levels: Levels, load: Load, ranges: Mapping[Phase, BudgetRange], batch: float, law: LawSettings
) -> Choice:
    """Return what these levels cost."""
    prefill, decode = ranges["prefill"], ranges["decode"]
    seconds = load.prefill_tokens * prefill.seconds[levels.prefill] / law.cost_prefill_tokens
    seconds += load.decode_tokens * decode.step_seconds(levels.decode, batch) / batch
    return Choice(levels, prefill.losses[levels.prefill] + decode.losses[levels.decode], seconds)


def best(
    found: Sequence[Choice],
    rate_per_second: float,
    critical: Critical,
    objective_ratio: float,
    law: LawSettings,
) -> Choice:
    """Return the choice with the smallest loss and price of late answers together.

    Among those that are expected to keep the objective with some room; else the fastest.
    """
    allowed = 1.0 - objective_ratio
    burns = [expected_burn(rate_per_second * one.work_seconds, critical, law) for one in found]
    costs = [
        (one.loss + law.load_miss_price_nats * allowed * burn, one)
        for one, burn in zip(found, burns, strict=True)
        if burn <= law.load_burn_ratio
    ]
    return min(costs, default=(0.0, found[-1]))[1]


def expected_burn(utilisation: float, critical: Critical, law: LawSettings) -> float:
    """Return the misses that are expected at a utilisation, over those that are allowed."""
    return math.exp(min(50.0, law.load_slope * (utilisation - critical.utilisation)))


def _prior_precision(law: LawSettings) -> float:
    return 1.0 / law.load_critical_spread**2
