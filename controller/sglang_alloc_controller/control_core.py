"""Control story, second and third step together: readings in, decisions out. No clock, no I/O.

The loop, the replay of a decision log and any simulator drive this same code.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from sglang_alloc.shared_table import CalmBudgets
from sglang_alloc.shared_table_words import RUNNING_ANY
from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.control_law import (
    decide,
    deficit_saturation,
    frozen,
    lasts,
    measured,
    not_taken,
    violates,
    window_start_seconds,
)
from sglang_alloc_controller.law_calm import with_calm_steps
from sglang_alloc_controller.law_capacity import Levels
from sglang_alloc_controller.law_state import (
    Calm,
    Decision,
    LawConstants,
    LawState,
    Reason,
    Seen,
    initial_state,
)
from sglang_alloc_controller.load_history import LoadHistory, PlausibleQueue
from sglang_alloc_controller.reading_history import ReadingHistory, Sample
from sglang_alloc_controller.samples import (
    PHASES,
    SLO_OF_PHASE,
    SLOS,
    InputState,
    Phase,
    Reading,
    Slo,
)
from sglang_alloc_controller.settings import Settings


class Forced(NamedTuple):
    """What a person forces at one tick; budgets in activations per token, None: nothing."""

    killed: Mapping[Phase, int] | None = None
    """Full quality, while the kill switch is on."""
    override: Mapping[Phase, int] | None = None


class _Standing(NamedTuple):
    """Budgets that somebody else than the law has put in force, and what is seen of them."""

    budgets: dict[Phase, int]
    since_seconds: float
    reading_at_seconds: float = -math.inf
    violates: bool = False


class _Advice(NamedTuple):
    """A step that the law would take, in shadow mode."""

    decision: Decision
    since_seconds: float
    reading_at_seconds: float
    """The newest reading that it was kept for."""


class _Lasting(NamedTuple):
    """A decision that stays the same while the law's state does and nothing else is seen."""

    state: LawState
    samples: Mapping[Slo, Sample | None]
    """Made anew from each reading, and when the window's begin moves."""
    decision: Decision

    def is_for(self, state: LawState, seen: Seen) -> bool:
        """Tell whether this is what would be decided now."""
        return state is self.state and seen.samples is self.samples and _is_judged(seen)


class ControlCore:
    """The readings of one engine and the law's memory of it."""

    def __init__(
        self,
        settings: Settings,
        ranges: Mapping[Phase, BudgetRange],
        budgets: Mapping[Phase, int],
        now_seconds: float,
        calm: CalmBudgets | None = None,
    ) -> None:
        """Begin without readings, at these budgets (activations per token), monotonic time."""
        self._settings = settings
        self.history = ReadingHistory(settings.law, settings.freshness)
        self._load_history = LoadHistory()
        self._queue_gauge, self._queue_requests = PlausibleQueue(), 0.0
        self._seen: tuple[float, Seen] | None = None
        self._standing: _Standing | None = None
        self._advice: _Advice | None = None
        self._lasting: _Lasting | None = None
        self.take_over(ranges, budgets, now_seconds, calm)

    def take_over(
        self,
        ranges: Mapping[Phase, BudgetRange],
        budgets: Mapping[Phase, int],
        now_seconds: float,
        calm: CalmBudgets | None = None,
    ) -> None:
        """Begin anew at these budgets, as if just chosen; the readings are kept.

        `calm` are those of calm steps, None: the same. They are kept by a law that has any.
        """
        settings = self._settings
        self.ranges = ranges
        self._constants = LawConstants(settings.slo, settings.law, settings.freshness, ranges)
        positions = {phase: ranges[phase].position(budgets[phase]) for phase in PHASES}
        state = initial_state(positions, settings.law, now_seconds)
        self.state: LawState = replace(state, calm=self._calm_found(calm))

    def _calm_found(self, calm: CalmBudgets | None) -> Calm | None:
        """Return the calm budgets of the selector as the law has its own."""
        ranges = self.ranges
        if calm is None or not self._settings.law.calm_budgets:
            return None
        if not all(ranges[phase].levels for phase in PHASES):
            return None  # without a cost model it follows from the budgets
        prefill, decode = (
            ranges[phase].level(ranges[phase].position(budget))
            for phase, budget in zip(PHASES, calm[:2], strict=True)
        )
        return Calm(Levels(prefill, decode), calm.running_requests)

    def take_settings(self, settings: Settings) -> None:
        """Go on under other settings, with the readings and the law's memory as they are."""
        if not settings.law.calm_budgets:
            self.state = replace(self.state, calm=None)
        self._settings, self._seen = settings, None
        self.history.take_settings(settings.law, settings.freshness)
        self._constants = LawConstants(
            settings.slo, settings.law, settings.freshness, self._constants.ranges
        )

    def take_in(self, reading: Reading, *, after_failure: bool) -> bool:
        """Take a reading in; return True when the engine started anew before it."""
        anew, self._seen = self.history.add(reading, after_failure=after_failure), None
        if anew:
            self._load_history.clear()
        if self.history.newest is reading:
            self._queue_requests = self._queue_gauge.take(
                reading.queue_requests, reading.taken_at_seconds
            )
            self._load_history.add(reading, self._queue_requests)
        return anew

    def seen(self, now_seconds: float) -> Seen:
        """Return what the law sees at `now_seconds`."""
        # Several ticks see the same reading; what it says of a window does not change between them.
        since_seconds = window_start_seconds(self.state, self._constants)
        if self._seen is None or self._seen[0] != since_seconds:
            self._seen = since_seconds, self._seen_since(since_seconds)
        return self._seen[1]._replace(
            now_seconds=now_seconds,
            input_state=self.history.input_state(now_seconds),
            warming_up=self.history.is_warming_up(now_seconds),
        )

    def _seen_since(self, since_seconds: float) -> Seen:
        """Return what the newest reading says of the budgets in force since then."""
        newest, law = self.history.newest, self._settings.law
        return Seen(
            now_seconds=math.nan,
            input_state=InputState.STALE,
            warming_up=False,
            samples=self._samples(since_seconds, law.window_seconds),
            long_samples=self._samples(since_seconds, law.long_window_seconds),
            event_rates={slo: self.history.event_rate(slo) for slo in SLO_OF_PHASE.values()},
            queue_requests=self._queue_requests,
            reading_at_seconds=newest.taken_at_seconds if newest else -math.inf,
            running_requests=newest.running_requests if newest else 0.0,
            load_windows=self._load_history.windows(),
            dispersion=self._load_history.dispersion(),
            newest=self.history.between_last_two(self._settings.slo),
        )

    def order(self, seen: Seen, forced: Forced) -> tuple[Decision, dict[Phase, int]]:
        """Return the decision and the budgets asked for.

        The first that is there decides: kill switch, override, the configuration's fixed budgets,
        the law. An override leaves asked for what would be without it. In shadow mode the law
        advises: what is asked for is its next step from full quality, which is in force.
        """
        if forced.killed is not None:
            return self._start_over(forced.killed, seen), dict(forced.killed)
        fixed = self._fixed()
        if forced.override is not None:
            decision = self._stand_still(Reason.OVERRIDE, forced.override, seen)
            if fixed is not None:
                return decision, fixed
            # What the law left for calm steps stays asked for.
            decision = with_calm_steps(decision, self.state, self._constants)
            return decision, self.budgets(decision)
        if fixed is not None:
            return self._stand_still(Reason.FIXED, fixed, seen), fixed
        self._standing = None
        decision = self._advise(seen) if self._settings.mode == "shadow" else self.decide(seen)
        return decision, self.budgets(decision)

    def decide(self, seen: Seen) -> Decision:
        """Let the law decide and remember."""
        lasting = self._lasting
        if lasting is not None and lasting.is_for(self.state, seen):
            return lasting.decision
        self.state, decision = decide(self.state, seen, self._constants)
        self._lasting = None
        if _is_judged(seen) and lasts(self.state, seen, decision, self._constants):
            self._lasting = _Lasting(self.state, seen.samples, decision)
        return decision

    def _advise(self, seen: Seen) -> Decision:
        """Let the law decide and learn, without a move."""
        acts, advice = _is_judged(seen), self._advice
        if acts and advice is not None and advice.reading_at_seconds == seen.reading_at_seconds:
            # With nothing new to say, the law would say that it has just moved.
            return advice.decision
        # Apart from the decision, which would forget the errors of the phase that it moves.
        before = measured(self.state, seen, self._constants) if acts else self.state
        after, decision = decide(before, seen, self._constants)
        self.state = not_taken(before, after, self._constants)
        if acts:
            violating = any(excess > 0 for excess in decision.excesses.values())
            ratio = self._saturation(self._positions(), violating)
            decision = decision._replace(saturation_ratio=ratio)
        since_seconds = seen.now_seconds
        hold_seconds = self._settings.law.degrade_hold_seconds
        if acts and advice is not None and since_seconds - advice.since_seconds < hold_seconds:
            # No step comes sooner after another one.
            decision, since_seconds = advice.decision, advice.since_seconds
        is_step = decision.positions != self._positions()
        self._advice = (
            _Advice(decision, since_seconds, seen.reading_at_seconds) if is_step else None
        )
        return decision

    def _stand_still(self, reason: Reason, budgets: Mapping[Phase, int], seen: Seen) -> Decision:
        """Keep the law's own positions while somebody else's `budgets` are in force."""
        self.state = frozen(self.state, reason, seen)
        return self._not_decided(reason, budgets, seen)

    def _start_over(self, budgets: Mapping[Phase, int], seen: Seen) -> Decision:
        """Forget everything but the readings while `budgets` are forced; go on from them."""
        self.take_over(self.ranges, budgets, seen.now_seconds)
        return self._not_decided(Reason.KILL_SWITCH, budgets, seen)

    def _fixed(self) -> dict[Phase, int] | None:
        fixed = self._settings.fixed
        if self._settings.mode != "fixed" or fixed is None:
            return None
        return {"prefill": fixed.prefill_budget, "decode": fixed.decode_budget}

    def budgets(self, decision: Decision) -> dict[Phase, int]:
        """Return the budgets that the decision's positions stand for."""
        return {phase: self.ranges[phase].budget(decision.positions[phase]) for phase in PHASES}

    def calm_budgets(self, decision: Decision) -> CalmBudgets | None:
        """Return what the decision asks for in calm steps; None: the budgets of all steps.

        A person's budgets hold always, so that beside them there are none.
        """
        positions = decision.calm_positions
        if positions is None:
            return None
        prefill, decode = (self.ranges[phase].budget(positions[phase]) for phase in PHASES)
        # A server that tells an absurd number must not make the table refuse the budgets.
        running_requests = min(RUNNING_ANY, max(1, decision.calm_running_requests))
        return CalmBudgets(prefill, decode, running_requests)

    def _not_decided(self, reason: Reason, budgets: Mapping[Phase, int], seen: Seen) -> Decision:
        in_force = {phase: self.ranges[phase].position(budgets[phase]) for phase in PHASES}
        violating = self._standing_violates(budgets, seen)
        stale = seen.input_state is InputState.STALE
        return Decision(
            self._positions(),
            dict.fromkeys(PHASES, reason),
            dict.fromkeys(PHASES, 0.0),
            math.nan if stale else self._saturation(in_force, violating),
        )

    def _standing_violates(self, budgets: Mapping[Phase, int], seen: Seen) -> bool:
        """Tell whether an SLO is violated under these budgets, by what came after them."""
        standing = self._standing
        if standing is None or standing.budgets != budgets:
            standing = _Standing(dict(budgets), seen.now_seconds)
        acts = _is_judged(seen)
        if acts and standing.reading_at_seconds != seen.reading_at_seconds:
            view = self._seen_since(standing.since_seconds + self._settings.law.dead_time_seconds)
            standing = standing._replace(
                reading_at_seconds=seen.reading_at_seconds,
                violates=violates(self.state, view, self._constants),
            )
        self._standing = standing
        return acts and standing.violates

    def _saturation(self, in_force: Mapping[Phase, float], violating: bool) -> float:
        """Return the saturation where the law may not give up more than this."""
        return 1.0 if violating else deficit_saturation(in_force)

    def _positions(self) -> dict[Phase, float]:
        return {phase: state.position for phase, state in self.state.phases.items()}

    def _samples(self, since_seconds: float, window_seconds: float) -> dict[Slo, Sample | None]:
        return {
            slo: self.history.sample(slo, self._settings.slo, since_seconds, window_seconds)
            for slo in SLOS
        }


def _is_judged(seen: Seen) -> bool:
    return seen.input_state is InputState.VALID and not seen.warming_up
