"""Control story, all steps in order: read, judge, decide, write, beat, report; once a tick."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog

from sglang_alloc.errors import AllocError, ConfigurationError, TableInUseError
from sglang_alloc.shared_table import CalmBudgets, Override
from sglang_alloc.shared_table_liveness import steps_now
from sglang_alloc_controller.bucket_edges import missing_edges
from sglang_alloc_controller.calm_shares import CalmShares
from sglang_alloc_controller.config_follower import ReloadOutcome
from sglang_alloc_controller.control_core import ControlCore, Forced
from sglang_alloc_controller.decision_log import DecisionLog
from sglang_alloc_controller.decision_record import beginning, tick_record
from sglang_alloc_controller.law_state import Decision, Seen, step_time_ratios
from sglang_alloc_controller.own_metrics import OwnMetrics
from sglang_alloc_controller.quality_bounds import Bounds, bounds_of
from sglang_alloc_controller.quality_minutes import QualityMinutes
from sglang_alloc_controller.samples import PHASES, InputState, Phase, Reading
from sglang_alloc_controller.series_fold import unseen_priorities
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.sglang_loads import decode_step_seconds
from sglang_alloc_controller.source_poller import Observation
from sglang_alloc_controller.table_link import TableLink
from sglang_alloc_controller.tick_report import CalmReport, TickReport, story

_NANOSECONDS = 1_000_000_000
# A fault that lasts is told again this often, not at every tick.
_REMINDER_SECONDS = 60.0
_LOGGED_KEYS = ("state", "reasons", "from", "to", "desired", "calm", "generation", "actor")
_log = structlog.get_logger("sglang_alloc_controller")

FollowConfig = Callable[[Callable[[Settings], None]], tuple[ReloadOutcome, Settings] | None]


class Surroundings(NamedTuple):
    """What the loop is given, so that tests can give it something else."""

    observe: Callable[[], Observation]
    clock_ns: Callable[[], int]
    """Monotonic clock."""
    sleep: Callable[[float], bool]
    """Sleeps for seconds; True: stop."""
    kill_cause: Callable[[], str | None] = lambda: None
    """What holds the kill switch on."""
    follow_config: FollowConfig = lambda accept: None
    """Gives the outcome of a reload of the settings, if there was one."""
    show: Callable[[TickReport], None] = lambda report: None
    """Takes each tick's report, for the live page."""


class _Budgets(NamedTuple):
    """Budgets as the table has them: of each phase, and of calm steps where these have others."""

    by_phase: dict[Phase, int]
    calm: CalmBudgets | None = None


class _Orders(NamedTuple):
    """What one tick decided, as budgets."""

    decision: Decision
    desired: _Budgets
    to_write: _Budgets | None
    """None: a person's override is in force, the table's stay."""
    override: Override | None = None
    kill_cause: str | None = None


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
        self.settings = settings
        self._link = link
        self._metrics = metrics
        self._decision_log = decision_log
        self._around = surroundings
        self._told: tuple[object, ...] = ()
        self._told_priorities: str | None = None
        self._reminded_at_seconds: dict[str, float] = {}
        self._below_full = QualityMinutes()
        self._calm_shares = CalmShares()
        self._last_reading: Reading | None = None
        self._decode_step_seconds: float | None = None
        self.ticked_at_seconds = -math.inf
        self.input_state = InputState.STALE
        now_seconds = surroundings.clock_ns() / _NANOSECONDS
        self._bounds = bounds_of(link.table, settings)
        budgets, calm = self._in_force()
        self._core = ControlCore(settings, self._bounds.ranges, budgets, now_seconds, calm)
        self._log_beginning(now_seconds, anew=True, started=True)

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
                # No fault of one tick may end control, nor keep the kill switch off. Without a beat
                # the workers fall back to full quality by themselves if it lasts.
                self._metrics.count_tick_error()
                self._remind("tick_failed", exc_info=True)
                self._obey_kill_switch()
            self._metrics.report_tick_seconds(time.thread_time() - started)
            if self._around.sleep(self.settings.tick_seconds):
                return

    def tick(self) -> None:
        """Go through all steps once."""
        now_ns = self._around.clock_ns()
        now_seconds = now_ns / _NANOSECONDS
        kill_cause = self._around.kill_cause()
        self._follow_table(now_seconds)
        written_before = self._written()
        if kill_cause is not None:
            # Before all that it is there to overrule.
            self._force_full_quality(now_ns, kill_cause)
        self._follow_config(now_seconds)
        observation = self._around.observe()
        reading = self._take_in(observation)
        seen = self._core.seen(now_seconds)
        orders = self._orders(seen, self._link.override(now_ns), kill_cause)
        if orders.to_write is not None:
            self._write(orders.to_write)
        self._link.beat(now_ns)
        self.ticked_at_seconds, self.input_state = now_seconds, seen.input_state
        report = self._report(seen, orders, written_before, observation)
        self._publish(report, reading)

    def _follow_table(self, now_seconds: float) -> None:
        try:
            bounds = self._link.follow_replacement(lambda table: bounds_of(table, self.settings))
        except TableInUseError:
            raise
        except AllocError as error:
            self._remind("table_unusable", problem=str(error), still_using="the earlier one")
            return
        if bounds is not None:
            self._begin_anew(bounds, now_seconds)
            _log.warning(
                "table_replaced",
                publication_id=self._link.table.publication_id,
                hint="a running server keeps the earlier table, at its fallback; restart it",
            )

    def _follow_config(self, now_seconds: float) -> None:
        accepted: list[Bounds] = []
        found = self._around.follow_config(
            lambda settings: accepted.append(self._accepted(settings))
        )
        if found is None:
            return
        outcome, settings = found
        self._metrics.count_reload(outcome.applied)
        if not outcome.applied:
            _log.warning("config_refused", problem=outcome.sentence, still_using="the last good")
            return
        _log.info("config_reloaded", outcome=outcome.sentence)
        mode_before, self.settings = self.settings.mode, settings
        self._metrics.take_settings(settings)
        self._core.take_settings(settings)
        (bounds,) = accepted
        if bounds.ranges != self._core.ranges or settings.mode != mode_before:
            self._begin_anew(bounds, now_seconds)
        else:
            self._log_beginning(now_seconds, anew=False)

    def _accepted(self, settings: Settings) -> Bounds:
        """Return the bounds by other settings; raise if table or server do not fit them."""
        bounds = bounds_of(self._link.table, settings)
        newest = self._core.history.newest
        sentences = missing_edges(newest, settings.slo) if newest else []
        if sentences:
            raise ConfigurationError(" ".join(sentences))
        return bounds

    def _begin_anew(self, bounds: Bounds, now_seconds: float) -> None:
        """Take over at the budgets that are in force, within these bounds."""
        self._bounds = bounds
        budgets, calm = self._in_force()
        self._core.take_over(bounds.ranges, budgets, now_seconds, calm)
        self._log_beginning(now_seconds, anew=True)

    def _log_beginning(self, now_seconds: float, **kind: bool) -> None:
        ranges, (budgets, calm) = self._core.ranges, self._in_force()
        line = beginning(self.settings, ranges, budgets, calm, now_seconds, **kind)
        self._decision_log.begin(line)

    def _take_in(self, observation: Observation) -> Reading | None:
        """Take in what was observed; return the reading if it is a new one."""
        if observation.error is not None:
            self._remind("source_failed", problem=observation.error)
        reading, last = observation.reading, self._last_reading
        if reading is None or reading is last:
            return None
        self._last_reading = reading
        for sentence in missing_edges(reading, self.settings.slo):
            self._remind("slo_not_measured", problem=sentence)
        self._tell_priorities(unseen_priorities(reading, self.settings.source))
        if last is not None and last.model_names != reading.model_names:
            _log.warning(
                "model_changed", before=sorted(last.model_names), now=sorted(reading.model_names)
            )
        if last is not None and last.load is not None and reading.load is not None:
            self._decode_step_seconds = decode_step_seconds(last.load, reading.load)
        if self._core.take_in(reading, after_failure=observation.failures_total > 0):
            self._metrics.count_restart()
            _log.info("engine_started", warmup_seconds=self.settings.freshness.warmup_seconds)
        return reading

    def _force_full_quality(self, now_ns: int, kill_cause: str) -> None:
        """Write full quality and end the override in force, and each that follows."""
        override = self._link.override(now_ns)
        if override is not None:
            self._link.clear_override()
            _log.warning("override_ended", actor=override.actor, by=kill_cause)
        self._write(self._full())

    def _obey_kill_switch(self) -> None:
        """Do after a tick that failed what the kill switch asks for, and beat for it."""
        try:
            kill_cause, now_ns = self._around.kill_cause(), self._around.clock_ns()
            if kill_cause is not None:
                self._force_full_quality(now_ns, kill_cause)
                self._link.beat(now_ns)
        except TableInUseError:
            raise
        except Exception:
            self._remind("kill_switch_failed", exc_info=True)

    def _tell_priorities(self, problem: str | None) -> None:
        if problem is not None and problem != self._told_priorities:
            _log.warning("priority_not_seen", problem=problem)
            self._told_priorities = problem

    def _orders(self, seen: Seen, override: Override | None, kill_cause: str | None) -> _Orders:
        full, budgets = self._full(), None
        if override is not None:
            budgets = _by_phase(override.prefill_budget, override.decode_budget)
        killed = full.by_phase if kill_cause is not None else None
        decision, asked = self._core.order(seen, Forced(killed, budgets))
        desired = _Budgets(asked, self._core.calm_budgets(decision))
        if kill_cause is not None:
            return _Orders(decision, desired, full, None, kill_cause)
        if override is not None:
            return _Orders(decision, desired, None, override)
        return _Orders(decision, desired, full if self.settings.mode == "shadow" else desired)

    def _write(self, budgets: _Budgets) -> None:
        by_phase, calm = budgets
        self._link.write(by_phase["prefill"], by_phase["decode"], calm)

    def _full(self) -> _Budgets:
        return _Budgets(dict.fromkeys(PHASES, self._link.table.shape.budget_max))

    def _in_force(self) -> _Budgets:
        """Return the budgets that the law begins with; those of shadow mode are about to be."""
        return self._full() if self.settings.mode == "shadow" else self._written()

    def _written(self) -> _Budgets:
        selector = self._link.selector()
        by_phase = _by_phase(selector.prefill_budget, selector.decode_budget)
        return _Budgets(by_phase, self._link.calm_budgets())

    def _report(
        self,
        seen: Seen,
        orders: _Orders,
        written_before: _Budgets,
        observation: Observation,
    ) -> TickReport:
        newest, ranges = self._core.history.newest, self._core.ranges
        worker = self._link.slowest_worker(round(seen.now_seconds * _NANOSECONDS))
        written = self._written().by_phase
        report = TickReport(
            input_state=seen.input_state,
            samples=seen.samples,
            queue_requests=seen.queue_requests,
            running_requests=newest.running_requests if newest else 0.0,
            sample_age_seconds=seen.now_seconds - seen.reading_at_seconds if newest else math.nan,
            reasons=orders.decision.reasons,
            burn_ratios={p: state.burn_ratio for p, state in self._core.state.phases.items()},
            excesses=orders.decision.excesses,
            desired=orders.desired.by_phase,
            written_before=written_before.by_phase,
            written=written,
            generation=self._link.selector().generation,
            override=orders.override,
            worker=worker,
            floors={phase: ranges[phase].floor for phase in PHASES},
            ceilings={phase: ranges[phase].ceiling for phase in PHASES},
            predicted_losses=self._bounds.predicted_losses(written),
            saturation_ratio=orders.decision.saturation_ratio,
            source_failures_total=observation.failures_total,
            source_error=observation.error,
            now_seconds=seen.now_seconds,
            kill_cause=orders.kill_cause,
            load=newest.load if newest else None,
            decode_step_seconds=self._decode_step_seconds,
            step_time_ratios=step_time_ratios(self._core.state),
            calm=self._calm_report(seen.now_seconds, orders.desired.calm, written_before.calm),
        )
        return self._with_quality_minutes(report)

    def _calm_report(
        self, now_seconds: float, desired: CalmBudgets | None, before: CalmBudgets | None
    ) -> CalmReport:
        shares, written = self._calm_shares, self._link.calm_budgets()
        shares.add(now_seconds, self._link.calm_tokens())
        losses: dict[Phase, float] = {}
        if written is not None:
            by_phase = _by_phase(written.prefill_budget, written.decode_budget)
            losses = self._bounds.predicted_losses(by_phase)
        ratios = {phase: shares.ratio(phase) for phase in PHASES}
        was_busy = {phase: shares.was_busy(phase) for phase in PHASES}
        return CalmReport(desired, before, written, losses, ratios, was_busy)

    def _with_quality_minutes(self, report: TickReport) -> TickReport:
        below_full = report.is_below_full and self._serves(report)
        window_seconds = 3600 * self.settings.quality.below_full_window_hours
        self._below_full.add(
            report.now_seconds, below_full=below_full, window_seconds=window_seconds
        )
        return report._replace(
            below_full_seconds_total=self._below_full.total_seconds,
            below_full_minutes=self._below_full.minutes(),
            below_full=below_full,
        )

    def _serves(self, report: TickReport) -> bool:
        """Tell whether somebody is there to get less than full quality."""
        if report.input_state is InputState.STALE:
            # Whether there is load is not known; a rank that steps serves somebody.
            now_ns = round(report.now_seconds * _NANOSECONDS)
            return report.worker is not None and steps_now(report.worker, now_ns)
        return report.input_state is not InputState.IDLE

    def _publish(self, report: TickReport, reading: Reading | None) -> None:
        self._metrics.report(report)
        self._around.show(report)
        told = story(report)
        every_tick = self.settings.decision_log.every_tick
        if told == self._told and not every_tick:
            return
        record = tick_record(report, self.settings.mode, reading if every_tick else None)
        self._decision_log.write(record)
        if told != self._told:
            _log.info("decision", **{key: record[key] for key in _LOGGED_KEYS})
        self._told = told

    def _remind(self, event: str, **details: object) -> None:
        now_seconds = self._around.clock_ns() / _NANOSECONDS
        if now_seconds - self._reminded_at_seconds.get(event, -math.inf) >= _REMINDER_SECONDS:
            self._reminded_at_seconds[event] = now_seconds
            _log.warning(event, **details)


def _by_phase(prefill: int, decode: int) -> dict[Phase, int]:
    return {"prefill": prefill, "decode": decode}
