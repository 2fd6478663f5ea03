"""Control story, beside every step: the controller's own metrics."""

import math

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    generate_latest,
)

from sglang_alloc_controller.law_state import Reason
from sglang_alloc_controller.samples import PHASES, InputState, Phase, Slo
from sglang_alloc_controller.settings import SloSettings
from sglang_alloc_controller.tick_report import TickReport

_PREFIX = "sglang_alloc_controller"
_SLOS: tuple[Slo, ...] = ("ttft", "itl")


class OwnMetrics:
    """The metrics of one controller, in a registry of their own."""

    def __init__(self, mode: str, slo: SloSettings) -> None:
        """Declare every series, so that each is there from the first scrape."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._desired = self._gauge(
            "budget_desired_activations", "Budget that the law asks for", "phase"
        )
        self._written = self._gauge(
            "budget_written_activations", "Budget in the shared table's selector", "phase"
        )
        self._acknowledged = self._gauge(
            "budget_acknowledged_activations",
            "Budget that the slowest worker rank uses; NaN before a worker runs",
            "phase",
        )
        self._floor = self._gauge("budget_floor_activations", "Smallest allowed budget", "phase")
        self._ceiling = self._gauge("budget_ceiling_activations", "Largest allowed budget", "phase")
        self._loss = self._gauge(
            "predicted_loss_nats", "Predicted loss per token of the written budget", "phase"
        )
        self._attainment = self._gauge(
            "slo_attainment_ratio", "Share of the window's events within the SLO", "slo"
        )
        self._events = self._gauge("slo_window_events", "Events in the window", "slo")
        self._quantile = self._gauge(
            "latency_quantile_seconds", "Estimated latency at the objective's share", "slo"
        )
        self._threshold = self._gauge("slo_threshold_seconds", "Latency that is promised", "slo")
        self._objective = self._gauge("slo_objective_ratio", "Share that is promised", "slo")
        self._burn = self._gauge(
            "burn_ratio", "Smoothed, clamped burn rate: misses over allowed misses", "slo"
        )
        self._excess = self._gauge("error_ratio", "Excess burn rate the phase reacts to", "phase")
        self._state = self._gauge("input_state", "One-hot state of the readings", "state")
        self._reason = self._gauge(
            "reason", "One-hot reason of the phase's budget", "phase", "reason"
        )
        self._mode = self._gauge("mode", "One-hot mode", "mode")
        self._queue = self._gauge("queue_requests", "Waiting requests of the busiest rank")
        self._queue_slo = self._gauge("queue_slo_requests", "Waiting requests that are allowed")
        self._running = self._gauge("running_requests", "Running requests of the busiest rank")
        self._saturation = self._gauge(
            "saturation_ratio", "0 full quality, up to 0.8 quality given up, 1 floor and violating"
        )
        self._infeasible = self._gauge(
            "infeasible", "1: at the floor and violating for long; add capacity"
        )
        self._age = self._gauge("sample_age_seconds", "Age of the newest reading")
        self._tick = self._gauge("tick_seconds", "CPU time of the last tick")
        self._generation = self._gauge("generation", "Generation in the selector")
        self._ticks = self._counter("ticks", "Ticks")
        self._tick_errors = self._counter("tick_errors", "Ticks that failed")
        self._source_failures = self._counter("source_failures", "Readings that failed")
        self._restarts = self._counter("engine_restarts", "Starts of the engine that were seen")
        self._log_errors = self._counter("decision_log_errors", "Log lines that were lost")
        self._changes = self._counter("budget_changes", "Budget changes", "phase", "direction")
        self._source_failures_seen = 0
        self._set_constants(mode, slo)

    def report(self, tick: TickReport) -> None:
        """Export one tick."""
        self._report_budgets(tick)
        self._report_latencies(tick)
        for state in InputState:
            self._state.labels(state.value).set(tick.input_state is state)
        for phase in PHASES:
            for reason in Reason:
                self._reason.labels(phase, reason.value).set(tick.reasons[phase] is reason)
            self._excess.labels(phase).set(tick.excesses[phase])
        self._queue.set(tick.queue_requests)
        self._running.set(tick.running_requests)
        self._saturation.set(tick.saturation_ratio)
        self._infeasible.set(Reason.INFEASIBLE in tick.reasons.values())
        self._age.set(tick.sample_age_seconds)
        self._ticks.inc()
        self._source_failures.inc(tick.source_failures_total - self._source_failures_seen)
        self._source_failures_seen = tick.source_failures_total

    def count_change(self, phase: Phase, *, up: bool) -> None:
        """Count one change of a written budget."""
        self._changes.labels(phase, "up" if up else "down").inc()

    def report_tick_seconds(self, cpu_seconds: float) -> None:
        """Export the CPU time that a tick took."""
        self._tick.set(cpu_seconds)

    def count_tick_error(self) -> None:
        """Count a tick that failed."""
        self._tick_errors.inc()

    def count_restart(self) -> None:
        """Count a start of the engine."""
        self._restarts.inc()

    def count_log_error(self) -> None:
        """Count a decision log line that could not be written."""
        self._log_errors.inc()

    def text(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    def _report_budgets(self, tick: TickReport) -> None:
        self._generation.set(tick.generation)
        for phase in PHASES:
            acknowledged = getattr(tick.worker, f"{phase}_budget") if tick.worker else math.nan
            self._desired.labels(phase).set(tick.desired[phase])
            self._written.labels(phase).set(tick.written[phase])
            self._acknowledged.labels(phase).set(acknowledged)
            self._floor.labels(phase).set(tick.floors[phase])
            self._ceiling.labels(phase).set(tick.ceilings[phase])
            self._loss.labels(phase).set(tick.predicted_losses[phase])

    def _report_latencies(self, tick: TickReport) -> None:
        burns = {"ttft": tick.burn_ratios["prefill"], "itl": tick.burn_ratios["decode"]}
        for slo in _SLOS:
            sample, burn = tick.samples[slo], burns[slo]
            within_ratio = sample.within_ratio if sample else None
            self._attainment.labels(slo).set(math.nan if within_ratio is None else within_ratio)
            self._events.labels(slo).set(sample.events if sample else 0)
            self._quantile.labels(slo).set(sample.quantile_seconds if sample else math.nan)
            self._burn.labels(slo).set(math.nan if burn is None else burn)

    def _set_constants(self, mode: str, slo: SloSettings) -> None:
        for name in ("control", "shadow", "fixed"):
            self._mode.labels(name).set(name == mode)
        thresholds = {"ttft": slo.ttft_seconds, "itl": slo.itl_seconds}
        for name, threshold in thresholds.items():
            self._threshold.labels(name).set(math.nan if threshold is None else threshold)
            self._objective.labels(name).set(slo.objective_ratio)
        self._queue_slo.set(slo.queue_requests)
        for phase in PHASES:
            for direction in ("up", "down"):
                self._changes.labels(phase, direction)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", text, labels, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self._registry)
