"""Control story, third step, forward: which budgets carry a load, and what the SLO allows. Pure.

A request takes of the engine's time, at the levels i of prefill and j of decode,

    prefill   its prompt tokens * seconds per token(i), in steps of two such prompts
    decode    few^2 * tokens * decode step(j, b) / b
    work      (prefill + decode) * slowdown / slack

where b is the largest batch that was seen: what a decode step costs each of its requests when the
engine is busy. few = min(1, running / (b / 5)): prefill goes first, so decode steps delay a first
token only where running slots are short. slack is the share of the TTFT SLO that is left after the
prompt's own prefill: long prompts can wait less. slowdown is how much longer than by the bench all
steps take (law_gain).

Utilisation is rate * work. In 137 simulated pairs of a constant load and constant budgets with 0.2
to 50 % late answers, these follow it with a root mean square error of 14 %: they grow by a factor
of e for each 1/`load_slope`, and one number is left to be learned, the critical utilisation c at
which exactly the allowed share is late:

    odds of a late answer = allowed * exp(load_slope * (felt - c) + doubt)
    felt  = 1 - (1 - utilisation) / dispersion
    doubt = (load_slope * work)^2 * variance of the rate / 2 / dispersion, at most 1.5

the doubt because misses are convex in the rate. The dispersion of the arrivals is 1 if they are
Poisson, as in those pairs. Requests that come more evenly wait less: in heavy traffic the tail of
the waiting time falls as exp(-2 (1 - utilisation) / variability * time), so that the room up to 1
counts for more. How much of the variability is of the sizes is not known: 0.3 at the least. Far
beyond the SLO, where everything is late, the share goes on growing a little with the logarithm of
the odds, so that more speed is still better.

    cost = loss + load_miss_price * (late - load_free_ratio * allowed)+
                + load_violation_price * (likely - allowed)+ + the miss price of the insured peak

where likely is late without the doubt: the objective is kept by what is most likely, and each
late answer beyond a few has the same price, wherever the load is.

c follows the counted misses k of each reading as the mean of a Poisson count with a normal prior
does:

    odds      = allowed / objective * exp(load_slope * (felt - c))
    by load   = odds / (1 + odds) * requests,   growth = load_slope * by load / (1 + odds)
    expected  = by load + allowed * load_stray_ratio * requests
    precision += growth^2 / expected / dispersion
    c         += growth * (1 - k / expected) / dispersion / precision

where strays are answers that would be late on an idle server too. Misses come in clumps, hence the
dispersion; old evidence fades, because servers change.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.law_load import Load
from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.samples import Phase
from sglang_alloc_controller.step_times import with_gain

Column = npt.NDArray[np.float64]
"""One value for each choice."""
Numbers = npt.NDArray[np.intp]
Number = TypeVar("Number", float, Column)

# c may move by this at once: one clump of late answers is no other server.
_STEP_MAX = 0.01
_BOUNDS = (0.1, 2.0)
# Prompts that share a prefill step under load.
_PROMPTS_PER_STEP = 2.0
# A rate known from a handful of requests shall not ask for the floor by doubt alone.
_DOUBT_MAX = 1.5
# From odds of e on, the share grows by this for each further factor of e.
_BEYOND = 0.05
# The sizes of requests differ too, however evenly they come.
_DISPERSION_MIN = 0.3
# Share of the largest batch under which few requests run.
_FEW_SHARE = 0.2


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


class Choices(NamedTuple):
    """Pairs of levels side by side, and what each costs, as in `Choice`."""

    prefill: Numbers
    decode: Numbers
    losses: Column
    work_seconds: Column


NO_CHOICES = Choices(np.array([], np.intp), np.array([], np.intp), np.array([]), np.array([]))


class Works(NamedTuple):
    """What a request takes of the engine's time at each level, in seconds."""

    prefill: Sequence[float]
    decode: Sequence[float]
    slack: float
    """Share of the TTFT SLO that is left for waiting, over how much slower the server is: both
    count for so much more."""


class Engine(NamedTuple):
    """What runs on the engine."""

    most: float
    """Most running requests ever seen."""
    mean: float
    """Running requests of the last minute."""
    slack: float = 1.0
    """Share of the TTFT SLO that is left after a prompt's own prefill."""
    prefill_gain: float = 1.0
    """What a smaller prefill budget saves over what the bench says (law_gain)."""
    decode_gain: float = 1.0
    slowdown: float = 1.0
    """How much longer than by the bench all steps take (law_gain)."""


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
    precision = max(min(critical.precision, _prior_precision(law)), kept)
    allowed = 1.0 - objective_ratio
    odds = math.exp(min(50.0, slope * (utilisation - critical.utilisation)))
    odds *= allowed / objective_ratio
    if requests <= 0:
        return critical._replace(precision=precision)
    share = odds / (1.0 + odds)
    counted, expected = missed_ratio * requests, share * requests
    # How much more are expected if c is less; far beyond everything misses, whatever c is.
    growth = slope * (1.0 - share) * expected
    expected += allowed * law.load_stray_ratio * requests
    precision += growth**2 / expected / dispersion
    step = growth * (1.0 - counted / expected) / dispersion / precision
    limit = _STEP_MAX * max(1.0, math.sqrt(_prior_precision(law) / precision))
    moved = critical.utilisation + min(limit, max(-limit, step))
    return Critical(min(_BOUNDS[1], max(_BOUNDS[0], moved)), precision)


def works_of(
    load: Load, ranges: Mapping[Phase, BudgetRange], engine: Engine, law: LawSettings
) -> Works:
    """Return what every level takes of the engine's time under this load."""
    prefill, decode = ranges["prefill"], ranges["decode"]
    tokens = step_tokens(load, prefill, law, _PROMPTS_PER_STEP)
    steps = with_gain(prefill.steps_seconds(tokens), engine.prefill_gain)
    before = [load.prefill_tokens * step / tokens for step in steps]
    tokens = min(1.0, engine.mean / (_FEW_SHARE * engine.most)) ** 2 * load.decode_tokens
    steps = with_gain(decode.steps_seconds(engine.most), engine.decode_gain)
    after = [tokens * step / engine.most for step in steps]
    return Works(before, after, engine.slack / engine.slowdown)


def choices(works: Works, ranges: Mapping[Phase, BudgetRange]) -> Choices:
    """Return the pairs of levels worth taking: the smallest loss first, each faster than before."""
    losses, prefill, decode = _by_loss(
        tuple(ranges["prefill"].losses), tuple(ranges["decode"].losses)
    )
    work_seconds = (np.array(works.prefill)[prefill] + np.array(works.decode)[decode]) / works.slack
    faster = np.ones(len(work_seconds), dtype=bool)
    faster[1:] = work_seconds[1:] < np.minimum.accumulate(work_seconds)[:-1]
    return Choices(prefill[faster], decode[faster], losses[faster], work_seconds[faster])


def work_of(levels: Levels, works: Works, ranges: Mapping[Phase, BudgetRange]) -> Choice:
    """Return what these levels cost."""
    seconds = works.prefill[levels.prefill] + works.decode[levels.decode]
    loss = ranges["prefill"].losses[levels.prefill] + ranges["decode"].losses[levels.decode]
    return Choice(levels, loss, seconds / works.slack)


def step_tokens(load: Load, prefill: BudgetRange, law: LawSettings, prompts: float) -> float:
    """Return the prompt tokens of a prefill step that so many prompts share under this load."""
    tokens = min(float(law.cost_prefill_tokens), prompts * load.prefill_tokens)
    return max(tokens, prefill.sizes[0])


class Demand(NamedTuple):
    """What the levels are chosen for."""

    rate_per_second: float
    variance: float = 0.0
    """Of the rate; 0: no doubt."""
    peak_per_second: float = 0.0
    peak_weight: float = 0.0
    """Share of the time in which a peak is there and not seen yet."""
    dispersion: float = 1.0
    """Of the arrivals."""


def felt(utilisation: Number, dispersion: float) -> Number:
    """Return the utilisation at which Poisson arrivals would be late as often as these."""
    return 1.0 - (1.0 - utilisation) / _variability(dispersion)


def _variability(dispersion: float) -> float:
    return max(_DISPERSION_MIN, dispersion)


def late_price(
    work_seconds: Column, demand: Demand, critical: float, objective_ratio: float, law: LawSettings
) -> Column:
    """Return the price of late answers where a request takes so much work, nats per token."""
    allowed = 1.0 - objective_ratio
    slope, price, at_critical = law.load_slope, law.load_miss_price_nats, math.log(allowed)
    dispersion = demand.dispersion
    beyond = slope * (felt(demand.rate_per_second * work_seconds, dispersion) - critical)
    log_odds = at_critical + beyond
    share = likely = late_share(log_odds)
    if demand.variance > 0:
        doubt = (slope * work_seconds) ** 2 * demand.variance / 2 / _variability(dispersion)
        share = late_share(log_odds + np.minimum(_DOUBT_MAX, doubt))
    total: Column = price * np.maximum(0.0, share - law.load_free_ratio * allowed)
    total += law.load_violation_price_nats * np.maximum(0.0, likely - allowed)
    if demand.peak_weight > 0:
        beyond = slope * (felt(demand.peak_per_second * work_seconds, dispersion) - critical)
        total += price * demand.peak_weight * late_share(at_critical + beyond)
    return total


def late_share(log_odds: Column) -> Column:
    """Return the share of late answers; it goes on growing a little where all are late."""
    odds = np.exp(np.minimum(0.0, log_odds))
    share: Column = odds / (1.0 + odds)
    if log_odds.max() > 0.0:
        beyond = _BEYOND * np.maximum(0.0, log_odds - 1.0)
        share += 0.25 * np.minimum(np.maximum(log_odds, 0.0), 1.0) + beyond
    return share


@lru_cache(maxsize=8)
def _by_loss(
    prefill: tuple[float, ...], decode: tuple[float, ...]
) -> tuple[Column, Numbers, Numbers]:
    """Return losses and levels of all pairs, the smallest loss first."""
    pairs = sorted((x + y, i, j) for i, x in enumerate(prefill) for j, y in enumerate(decode))
    losses, before, after = zip(*pairs, strict=True)
    return np.array(losses), np.array(before), np.array(after)


def _prior_precision(law: LawSettings) -> float:
    return 1.0 / law.load_critical_spread**2
