"""Control story, all steps in order: read, judge, decide, write, beat, report; once a tick."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog

from sglang_alloc.errors import AllocError, TableInUseError
from sglang_alloc.shared_table import Override, SharedTable
from sglang_alloc_controller.bucket_edges import missing_edges
from sglang_alloc_controller.control_law import (
    decide,
    deficit_saturation,
    frozen,
    window_start_seconds,
)
from sglang_alloc_controller.decision_log import DecisionLog
from sglang_alloc_controller.law_state import (
    Decision,
    LawConstants,
    LawState,
    Reason,
    Seen,
    initial_state,
)
from sglang_alloc_controller.own_metrics import OwnMetrics
from sglang_alloc_controller.quality_bounds import budget_ranges, predicted_loss
from sglang_alloc_controller.reading_history import ReadingHistory, Sample
from sglang_alloc_controller.samples import PHASES, SLO_OF_PHASE, InputState, Phase, Slo
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.source_poller import Observation
from sglang_alloc_controller.table_link import TableLink
from sglang_alloc_controller.tick_report import TickReport, record, story

_NANOSECONDS = 1_000_000_000
# A fault that lasts is told again this often, not at every tick.
_REMINDER_SECONDS = 60.0
_LOGGED_KEYS = ("state", "reasons", "from", "to", "desired", "generation", "actor")
_log = structlog.get_logger("sglang_alloc_controller")


class Surroundings(NamedTuple):
    """What the loop is given, so that tests can give it something else."""

    observe: Callable[[], Observation]
    clock_ns: Callable[[], int]
    """Monotonic clock."""
    sleep: Callable[[float], bool]
    """Sleeps for seconds; True: stop."""


class ControlLoop:
    """One controller of one table."""

    def __init__(
        self,
        settings: Settings,
        link: TableLink,
        metrics: OwnMetrics,
        decision_log: DecisionLog,
        surroundings: Surroundings,
    ) -> None:
        """Take over where the selector is; the budgets do not move."""
        self._settings = settings
        self._link = link
        self._metrics = metrics
        self._decision_log = decision_log
        self._around = surroundings
        self._history = ReadingHistory(settings.law, settings.freshness)
        self._told: tuple[object, ...] = ()
        self._reminded_at_seconds: dict[str, float] = {}
        self.ticked_at_seconds = -math.inf
        self.input_state = InputState.STALE
        self._take_over(link.table)

    def run(self) -> None:
        """Tick until the sleep says stop.

        Raises:
            TableInUseError: another writer took over; two must not write.
        """
        while True:
            started = time.thread_time()
            try:
                self.tick()
            except TableInUseError:
                raise
            except Exception:
                # No fault of one tick may end control. Without a beat the workers fall back to
                # full quality by themselves if it lasts.
                self._metrics.count_tick_error()
                self._remind("tick_failed", exc_info=True)
            self._metrics.report_tick_seconds(time.thread_time() - started)
            if self._around.sleep(self._settings.tick_seconds):
                return

    def tick(self) -> None:
        """Go through all steps once."""
        now_ns = self._around.clock_ns()
        self._follow_table()
        observation = self._around.observe()
        self._take_in(observation)
        seen = self._seen(now_ns / _NANOSECONDS)
        override = self._link.override(now_ns)
        decision = self._decide(seen, override)
        selector = self._link.selector()
        written_before = _by_phase(selector.prefill_budget, selector.decode_budget)
        self._write(decision, override)
        self._link.beat(now_ns)
        self.ticked_at_seconds, self.input_state = seen.now_seconds, seen.input_state
        self._publish(self._report(seen, decision, override, written_before, observation))

    def _take_over(self, table: SharedTable) -> None:
        ranges = budget_ranges(table, self._settings)
        self._constants = LawConstants(
            self._settings.slo, self._settings.law, self._settings.freshness, ranges
        )
        self._losses = {phase: predicted_loss(table, phase) for phase in PHASES}
        selector = table.selector()
        budgets = _by_phase(selector.prefill_budget, selector.decode_budget)
        positions = {phase: ranges[phase].position(budgets[phase]) for phase in PHASES}
        now_seconds = self._around.clock_ns() / _NANOSECONDS
        self._state: LawState = initial_state(positions, self._settings.law, now_seconds)

    def _follow_table(self) -> None:
        try:
            if self._link.follow_replacement():
                self._take_over(self._link.table)
                _log.warning(
                    "table_replaced",
                    publication_id=self._link.table.publication_id,
                    hint="a running server keeps the earlier table, at its fallback; restart it",
                )
        except TableInUseError:
            raise
        except AllocError as error:
            self._remind("table_unusable", problem=str(error), still_using="the earlier one")

    def _take_in(self, observation: Observation) -> None:
        if observation.error is not None:
            self._remind("source_failed", problem=observation.error)
        if observation.reading is None or observation.reading is self._history.newest:
            return
        for sentence in missing_edges(observation.reading, self._settings.slo):
            self._remind("slo_not_measured", problem=sentence)
        if self._history.add(observation.reading, after_failure=observation.failures_total > 0):
            self._metrics.count_restart()
            _log.info("engine_started", warmup_seconds=self._settings.freshness.warmup_seconds)

    def _seen(self, now_seconds: float) -> Seen:
        newest = self._history.newest
        return Seen(
            now_seconds=now_seconds,
            input_state=self._history.input_state(now_seconds),
            warming_up=self._history.is_warming_up(now_seconds),
            samples=self._samples(self._settings.law.window_seconds),
            long_samples=self._samples(self._settings.law.long_window_seconds),
            event_rates={slo: self._history.event_rate(slo) for slo in SLO_OF_PHASE.values()},
            queue_requests=newest.queue_requests if newest else 0.0,
            reading_at_seconds=newest.taken_at_seconds if newest else -math.inf,
        )

    def _samples(self, window_seconds: float) -> dict[Slo, Sample | None]:
        return {
            slo: self._history.sample(
                slo,
                self._settings.slo,
                window_start_seconds(self._state, self._constants),
                window_seconds,
            )
            for slo in SLO_OF_PHASE.values()
        }

    def _decide(self, seen: Seen, override: Override | None) -> Decision:
        if override is not None:
            budgets = _by_phase(override.prefill_budget, override.decode_budget)
            return self._decide_nothing(Reason.OVERRIDE, budgets, seen)
        fixed = self._settings.fixed
        if self._settings.mode == "fixed" and fixed is not None:
            budgets = _by_phase(fixed.prefill_budget, fixed.decode_budget)
            return self._decide_nothing(Reason.FIXED, budgets, seen)
        self._state, decision = decide(self._state, seen, self._constants)
        return decision

    def _decide_nothing(self, reason: Reason, budgets: dict[Phase, int], seen: Seen) -> Decision:
        """Keep the law's own positions while these budgets are in force."""
        self._state = frozen(self._state, reason, seen)
        positions = {phase: state.position for phase, state in self._state.phases.items()}
        ranges = self._constants.ranges
        in_force = {phase: ranges[phase].position(budgets[phase]) for phase in PHASES}
        return Decision(
            positions,
            dict.fromkeys(PHASES, reason),
            dict.fromkeys(PHASES, 0.0),
            deficit_saturation(in_force),
        )

    def _desired(self, decision: Decision) -> dict[Phase, int]:
        fixed = self._settings.fixed
        if self._settings.mode == "fixed" and fixed is not None:
            return _by_phase(fixed.prefill_budget, fixed.decode_budget)
        ranges = self._constants.ranges
        return {phase: ranges[phase].budget(decision.positions[phase]) for phase in PHASES}

    def _write(self, decision: Decision, override: Override | None) -> None:
        desired = self._desired(decision)
        if self._settings.mode == "shadow":
            desired = dict.fromkeys(PHASES, self._link.table.shape.budget_max)
        if override is None:
            self._link.write(desired["prefill"], desired["decode"])

    def _report(
        self,
        seen: Seen,
        decision: Decision,
        override: Override | None,
        written_before: dict[Phase, int],
        observation: Observation,
    ) -> TickReport:
        newest, ranges = self._history.newest, self._constants.ranges
        selector = self._link.selector()
        written = _by_phase(selector.prefill_budget, selector.decode_budget)
        budget_min = self._link.table.shape.budget_min
        return TickReport(
            input_state=seen.input_state,
            samples=seen.samples,
            queue_requests=seen.queue_requests,
            running_requests=newest.running_requests if newest else 0.0,
            sample_age_seconds=seen.now_seconds - seen.reading_at_seconds if newest else math.nan,
            reasons=decision.reasons,
            burn_ratios={phase: self._state.phases[phase].burn_ratio for phase in PHASES},
            excesses=decision.excesses,
            desired=self._desired(decision),
            written_before=written_before,
            written=written,
            generation=selector.generation,
            override=override,
            worker=self._link.slowest_worker(),
            floors={phase: ranges[phase].floor for phase in PHASES},
            ceilings={phase: ranges[phase].ceiling for phase in PHASES},
            predicted_losses={
                phase: float(self._losses[phase][written[phase] - budget_min]) for phase in PHASES
            },
            saturation_ratio=decision.saturation_ratio,
            source_failures_total=observation.failures_total,
            source_error=observation.error,
        )

    def _publish(self, report: TickReport) -> None:
        self._metrics.report(report)
        told = story(report)
        if told == self._told and not self._settings.decision_log.every_tick:
            return
        line = record(report, self._settings.mode)
        self._decision_log.write(line)
        if told != self._told:
            _log.info("decision", **{key: line[key] for key in _LOGGED_KEYS})
        self._told = told

    def _remind(self, event: str, **details: object) -> None:
        now_seconds = self._around.clock_ns() / _NANOSECONDS
        if now_seconds - self._reminded_at_seconds.get(event, -math.inf) >= _REMINDER_SECONDS:
            self._reminded_at_seconds[event] = now_seconds
            _log.warning(event, **details)


def _by_phase(prefill: int, decode: int) -> dict[Phase, int]:
    return {"prefill": prefill, "decode": decode}
