"""Control story, third step, forward: other budgets for calm steps than for the rest. Pure.

An engine step is calm if it leaves no request waiting and if fewer than R requests ran before it,
`calm_running_ratio` of the most that were ever seen. Late answers come from clumps of requests, so
speed is needed in the other steps, the busy ones, and these are few: budgets that are small in busy
steps alone lose about half to three quarters of the quality that as many late answers cost if they
always hold, on a GPU's step times two thirds to four fifths (docs/simulator.md).

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
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sglang_alloc.shared_table_words import RUNNING_ANY
from sglang_alloc_controller.law_capacity import (
    Choice,
    Choices,
    Column,
    Demand,
    Levels,
    Numbers,
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


@dataclass(frozen=True)
class Plans:
    """Every plan that a look weighs, side by side; the last is the one in force."""

    pairs: Choices
    """Those worth taking and, as the last two, those in force in busy and in calm steps."""
    busy: Numbers
    """Which of the pairs each plan takes in busy steps."""
    calm: Numbers
    losses: Column
    work_seconds: Column
    busy_shares: Column

    @property
    def in_force(self) -> Plan:
        """The plan in force."""
        return self._plan(-1)

    def cost_in_force(self, demand: Demand, critical: float, constants: LawConstants) -> float:
        """Return loss and price of late answers of the plan in force, nats per token."""
        (price,) = self._prices(slice(-1, None), demand, critical, constants)
        return float(self.losses[-1] + price)

    def cheapest(
        self, demand: Demand, critical: float, constants: LawConstants
    ) -> tuple[Plan, float]:
        """Return the cheapest other plan, and what it saves, nats per token.

        Where there is no other, it is the one in force.
        """
        if len(self.losses) == 1:
            return self.in_force, 0.0
        costs = self.losses + self._prices(slice(None), demand, critical, constants)
        best = int(costs[:-1].argmin())
        return self._plan(best), float(costs[-1] - costs[best])

    def _prices(
        self, plans: slice, demand: Demand, critical: float, constants: LawConstants
    ) -> Column:
        objective_ratio, law = constants.slo.objective_ratio, constants.law
        return late_price(self.work_seconds[plans], demand, critical, objective_ratio, law)

    def _plan(self, number: int) -> Plan:
        pairs, busy, calm = self.pairs, self.busy[number], self.calm[number]
        return Plan(
            Levels(int(pairs.prefill[busy]), int(pairs.decode[busy])),
            Levels(int(pairs.prefill[calm]), int(pairs.decode[calm])),
            float(self.losses[number]),
            float(self.work_seconds[number]),
            float(self.busy_shares[number]),
        )


def plans_of(
    found: Choices, in_force: tuple[Choice, Choice], demand: Demand, law: LawSettings
) -> Plans:
    """Return the plans that can be made of the pairs `found`, and what they lose under the demand.

    `found` are those worth taking, the smallest loss first; `in_force` is obeyed now, in busy and
    in calm steps.
    """
    count = len(found.losses)
    busy, calm = _pairs(
        count, found.prefill.tobytes(), found.decode.tobytes(), calm_budgets=law.calm_budgets
    )
    prefill, decode = zip(*(one.levels for one in in_force), strict=True)
    pairs = Choices(
        np.concatenate((found.prefill, prefill)),
        np.concatenate((found.decode, decode)),
        np.concatenate((found.losses, [one.loss for one in in_force])),
        np.concatenate((found.work_seconds, [one.work_seconds for one in in_force])),
    )
    works = pairs.work_seconds[busy], pairs.work_seconds[calm]
    shares = _busy_shares(*works, demand)
    losses = shares * pairs.losses[busy] + (1.0 - shares) * pairs.losses[calm]
    return Plans(pairs, busy, calm, losses, _late_work(*works), shares)


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
def _pairs(
    count: int, prefill: bytes, decode: bytes, *, calm_budgets: bool
) -> tuple[Numbers, Numbers]:
    """Return the numbers of all pairs for busy steps, and of those for calm steps beside each.

    Calm steps have at least the levels of the busy ones. Behind all stand the two in force.
    """
    if calm_budgets and count:
        levels = np.frombuffer(prefill, np.intp), np.frombuffer(decode, np.intp)
        beside = np.logical_and(*(one >= one[:, None] for one in levels))
        busy, calm = np.nonzero(beside)
    else:
        busy = calm = np.arange(count)
    return np.append(busy, count), np.append(calm, count + 1)


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
