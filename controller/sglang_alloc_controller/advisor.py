"""Control story, before the first step: which knob buys the most latency per loss, and where. Pure.

The knobs are the prefill budget and the decode budget of each mode that was measured (in `union`
the latter opens a step's set of experts). All are counted in the engine's time of a request,

    seconds = P * T_prefill(C, prefill budget) / C + O * T_decode(B, decode budget) / B

for P prompt tokens, O output tokens, prefill steps of C tokens and B running requests, and in the
predicted loss per output token, which adds up over the phases. The budgets worth using of a knob
are the corners of the lower convex hull of its points (loss, seconds): between them nothing buys
more per loss. Taking the steps of both phases in the order of seconds saved per nat gives, for
every loss, the pair of budgets with the least engine time.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sglang_alloc_controller.samples import Phase

# A loss below this is none: predicted losses are measured to about this many nats per token.
LOSS_RESOLUTION = 1e-5


class RequestShape(NamedTuple):
    """What an average request asks of the engine, and in what company."""

    prompt_tokens: int
    output_tokens: int
    running_requests: int
    """B: requests that share a decode step."""
    chunk_tokens: int
    """C: prompt tokens of a prefill step."""


class Knob(NamedTuple):
    """One phase's budgets in one mode; the last is full."""

    phase: Phase
    mode: str
    budgets: Sequence[int]
    """Ascending, activations per token."""
    seconds: Sequence[float]
    """Engine time that a request takes in this phase at each budget."""
    losses: Sequence[float]
    """Predicted loss of each budget, nats per output token."""


class Step(NamedTuple):
    """From one corner of a knob's hull to the next one down."""

    phase: Phase
    budget: int
    """The budget after the step."""
    seconds_saved: float
    """Per request."""
    loss_added: float
    """Nats per output token."""

    @property
    def seconds_per_nat(self) -> float:
        return self.seconds_saved / max(LOSS_RESOLUTION, self.loss_added)


class Choice(NamedTuple):
    """What a bound on the loss buys."""

    prefill_budget: int
    decode_budget: int
    seconds_saved: float
    loss: float


def efficient_steps(knob: Knob) -> list[Step]:
    """Return the knob's steps from full down, each worth less per nat than the one before."""
    points = list(zip(knob.budgets, knob.seconds, knob.losses, strict=True))
    here = points.pop()
    steps: list[Step] = []
    while True:
        ahead = [_step(knob.phase, here, point) for point in points if point[0] < here[0]]
        faster = [step for step in ahead if step.seconds_saved > 0]
        if not faster:
            return steps
        steps.append(max(faster, key=lambda step: (step.seconds_per_nat, step.budget)))
        here = next(point for point in points if point[0] == steps[-1].budget)


def _step(phase: Phase, above: tuple[int, float, float], below: tuple[int, float, float]) -> Step:
    return Step(phase, below[0], above[1] - below[1], max(0.0, below[2] - above[2]))


def merged_steps(knobs: Sequence[Knob]) -> list[Step]:
    """Return the efficient steps of several knobs, the most seconds per nat first.

    The steps of one knob keep their order: hulls are convex.
    """
    steps = [step for knob in knobs for step in efficient_steps(knob)]
    return sorted(steps, key=lambda step: -step.seconds_per_nat)


def best_within(knobs: Sequence[Knob], max_loss: float) -> Choice:
    """Return the budgets of least engine time whose losses sum to `max_loss` at most.

    Whole steps are taken in order, and the first one that does not fit ends the path, so that a
    larger bound never gives a phase more quality than a smaller one. A phase without a knob stays
    at 0 in the answer.
    """
    budgets = {knob.phase: knob.budgets[-1] for knob in knobs}
    saved = loss = 0.0
    for step in merged_steps(knobs):
        if loss + step.loss_added > max_loss:
            break
        budgets[step.phase] = step.budget
        saved, loss = saved + step.seconds_saved, loss + step.loss_added
    return Choice(budgets.get("prefill", 0), budgets.get("decode", 0), saved, loss)
