"""Control story, third step, forward: other budgets for calm steps than for the rest. Pure.

An engine step is calm if it leaves no request waiting and if fewer than R requests ran before it,
`calm_running_ratio` of the most that were ever seen. Late answers come from clumps of requests, so
speed is needed in the other steps, the busy ones, and these are few: budgets that are small in busy
steps alone lose half to a third of the quality that as many late answers cost if they always hold.

In some 300 simulated pairs of pairs, under constant loads and on two plants (two CPU cores, an
H200), late answers and the share of tokens in busy steps both follow utilisations, with root mean
square errors of 0.1 and 0.05 in the logarithm of their odds:

    late   by 0.6 * work(busy pair) + 0.4 * work(calm pair), as in law_capacity
    busy   1 / (1 + exp(-8.5 * (felt - 1))),  by 0.4 * work(busy pair) + 0.6 * work(calm pair)
    loss   busy * loss(busy pair) + (1 - busy) * loss(calm pair)

Between the plants the first weight is 0.77 and 0.49, the second 0.45 and 0.3, the slope 8.4 and 7.5
and the utilisation at which half of the tokens are in busy steps 0.95 and 1.15.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sglang_alloc.shared_table_words import RUNNING_ANY
from sglang_alloc_controller.law_capacity import (
    Choice,
    Column,
    Demand,
    Levels,
    cost,
    felt,
    late_price,
)
from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.law_state import (
    Decision,
    LawConstants,
    LawState,
    calm_levels_of,
    has_step_times,
)
from sglang_alloc_controller.samples import PHASES

# Weight of the busy pair's work in what late answers go by, and in what the busy share does.
_LATE_WEIGHT, _SHARE_WEIGHT = 0.6, 0.4
# The busy share grows by a factor of e for each 1/slope of utilisation, and is a half here.
_SHARE_SLOPE, _SHARE_HALF = 8.5, 1.0
# Beyond these the exponential is 0 or 1 to all digits.
_EXPONENT_MAX = 50.0


class Plan(NamedTuple):
    """A pair of levels for busy steps and one for calm steps, and what they cost together."""

    levels: Levels
    """In busy steps."""
    calm: Levels
    loss: float
    """Expected under the load, nats per token."""
    work_seconds: float
    """The engine's time for a request, as late answers go by it."""
    busy_share: float
    """Share of the tokens in busy steps."""


def plan_of(busy: Choice, calm: Choice, demand: Demand) -> Plan:
    """Return what two pairs cost together."""
    works = np.array([busy.work_seconds]), np.array([calm.work_seconds])
    share = float(_busy_shares(*works, demand)[0])
    loss = share * busy.loss + (1.0 - share) * calm.loss
    return Plan(busy.levels, calm.levels, loss, float(_late_work(*works)[0]), share)


def cheapest(
    now: Plan,
    found: Sequence[Choice],
    demand: Demand,
    *,
    critical: float,
    objective_ratio: float,
    law: LawSettings,
) -> tuple[Plan, float]:
    """Return the cheapest plan of the pairs `found`, and what it saves, nats per token.

    `found` are those worth taking, the smallest loss first.
    """
    busy, calm = _pairs(tuple(one.levels for one in found), calm_budgets=law.calm_budgets)
    losses = np.array([one.loss for one in found])
    works = np.array([one.work_seconds for one in found])
    work_seconds = _late_work(works[busy], works[calm])
    shares = _busy_shares(works[busy], works[calm], demand)
    loss = shares * losses[busy] + (1.0 - shares) * losses[calm]
    price = late_price(work_seconds, demand, critical, objective_ratio, law)
    best = int(np.argmin(loss + price))
    plan = plan_of(found[busy[best]], found[calm[best]], demand)
    present = cost(now, demand, critical, objective_ratio, law)
    return plan, present - float(loss[best] + price[best])


def with_calm_steps(decision: Decision, state: LawState, constants: LawConstants) -> Decision:
    """Return the decision with the positions of calm steps, where they have larger budgets.

    A law that looked ahead has chosen them, beside the budgets in force. Where latencies choose the
    budgets, `calm_kept_ratio` of what these give up is kept in steps that leave no request waiting.
    """
    if min(decision.positions.values()) >= 1.0:
        return decision  # nothing is given up
    ranges, law = constants.ranges, constants.law
    positions, running_requests = dict(decision.positions), RUNNING_ANY
    if state.calm is not None:
        levels = zip(PHASES, calm_levels_of(state, constants), strict=True)
        positions = {phase: ranges[phase].level_position(level) for phase, level in levels}
        running_requests = state.calm.running_requests
    elif law.calm_budgets and (state.by_latencies or not has_step_times(constants)):
        kept = law.calm_kept_ratio
        positions = {phase: one + kept * (1.0 - one) for phase, one in positions.items()}
    if all(
        ranges[phase].budget(positions[phase]) == ranges[phase].budget(decision.positions[phase])
        for phase in PHASES
    ):
        return decision
    return decision._replace(calm_positions=positions, calm_running_requests=running_requests)


@lru_cache(maxsize=8)
def _pairs(found: tuple[Levels, ...], *, calm_budgets: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of all pairs for busy steps, and of those for calm steps beside each.

    Calm steps have at least the levels of the busy ones.
    """
    if not calm_budgets:
        alone = np.arange(len(found))
        return alone, alone
    prefill, decode = np.array(found).T
    beside = (prefill >= prefill[:, None]) & (decode >= decode[:, None])
    busy, calm = np.nonzero(beside)
    return busy, calm


def _late_work(busy: Column, calm: Column) -> Column:
    return _LATE_WEIGHT * busy + (1.0 - _LATE_WEIGHT) * calm


def _busy_shares(busy: Column, calm: Column, demand: Demand) -> Column:
    work_seconds = _SHARE_WEIGHT * busy + (1.0 - _SHARE_WEIGHT) * calm
    beyond = felt(demand.rate_per_second * work_seconds, demand.dispersion) - _SHARE_HALF
    exponent = np.minimum(np.maximum(_SHARE_SLOPE * beyond, -_EXPONENT_MAX), _EXPONENT_MAX)
    shares: Column = 1.0 / (1.0 + np.exp(-exponent))
    return shares


def running_limit(most_running: float, law: LawSettings) -> int:
    """Return R, by the most running requests that were seen."""
    return max(1, math.floor(law.calm_running_ratio * most_running))
