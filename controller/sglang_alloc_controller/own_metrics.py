"""Control story, beside every step: the controller's own metrics, made when they are scraped.

A tick only leaves its report behind; the series are built from the last one by each scrape.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sglang_alloc_controller.law_state import Reason
from sglang_alloc_controller.samples import PHASES, SLOS, InputState, Phase
from sglang_alloc_controller.settings import QualitySettings, Settings, SloSettings
from sglang_alloc_controller.tick_report import TickReport

_Key = TypeVar("_Key", bound=str)
_PREFIX = "sglang_alloc_controller_"
_MODES = ("control", "shadow", "fixed")
_COUNTERS = {
    "ticks": "Ticks",
    "tick_errors": "Ticks that failed",
    "engine_restarts": "Starts of the engine that were seen",
    "decision_log_errors": "Lines of the decision log that were lost",
}


class _Changes:
    """Changes of one pair of budgets, by phase."""

    def __init__(self) -> None:
        self._changes: Counter[tuple[Phase, str]] = Counter()
        self._reversals: Counter[Phase] = Counter()
        self._last_direction: dict[Phase, str] = {}

    def add(self, before: Mapping[Phase, int], now: Mapping[Phase, int]) -> None:
        """Count what a tick changed."""
        for phase in PHASES:
            if now[phase] != before[phase]:
                self._count(phase, "up" if now[phase] > before[phase] else "down")

    def _count(self, phase: Phase, direction: str) -> None:
        self._changes[phase, direction] += 1
        if self._last_direction.get(phase, direction) != direction:
            self._reversals[phase] += 1
        self._last_direction[phase] = direction

    def series(self, name: str, what: str) -> Iterator[Metric]:
        """Yield the two counters; `what` says of what."""
        changes = CounterMetricFamily(
            f"{_PREFIX}{name}_changes", f"Changes of {what}", labels=["phase", "direction"]
        )
        for phase in PHASES:
            for direction in ("up", "down"):
                changes.add_metric([phase, direction], self._changes[phase, direction])
        yield changes
        text = f"Changes of {what} against the one before"
        reversals = CounterMetricFamily(f"{_PREFIX}{name}_reversals", text, labels=["phase"])
        for phase in PHASES:
            reversals.add_metric([phase], self._reversals[phase])
        yield reversals


class OwnMetrics(Collector):
    """The counters of one controller and the report of its last tick."""

    def __init__(
        self,
        mode: str,
        slo: SloSettings,
        quality: QualitySettings | None = None,
        lost_log_lines: Callable[[], int] = lambda: 0,
    ) -> None:
        """Start at zero, without a tick; `lost_log_lines` tells those of standard error."""
        self._lost_log_lines = lost_log_lines
        self._mode = mode
        self._slo = slo
        self._quality = quality or QualitySettings()
        self._reload_ok = True
        self._reloads: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._changes, self._calm_changes = _Changes(), _Changes()
        self._tick: TickReport | None = None
        self._tick_seconds = 0.0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def report(self, tick: TickReport) -> None:
        """Take the report of a tick and count its changes."""
        self._counts["ticks"] += 1
        self._changes.add(tick.written_before, tick.written)
        self._calm_changes.add(tick.calm_written_before, tick.calm_written)
        self._tick = tick

    def report_tick_seconds(self, cpu_seconds: float) -> None:
        """Take the CPU time that a tick took."""
        self._tick_seconds = cpu_seconds

    def take_settings(self, settings: Settings) -> None:
        """Report these promises from now on."""
        self._mode, self._slo, self._quality = settings.mode, settings.slo, settings.quality

    def count_reload(self, applied: bool) -> None:
        """Count a reload of the configuration, which was applied or refused."""
        self._reload_ok = applied
        self._reloads["applied" if applied else "refused"] += 1

    def count_tick_error(self) -> None:
        """Count a tick that failed."""
        self._counts["tick_errors"] += 1

    def count_restart(self) -> None:
        """Count a start of the engine."""
        self._counts["engine_restarts"] += 1

    def count_log_error(self) -> None:
        """Count a decision log line that could not be written."""
        self._counts["decision_log_errors"] += 1

    def text(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield every series; those of a tick only after the first one."""
        yield from self._constants()
        yield from self._counters()
        tick = self._tick
        if tick is not None:
            yield from _budgets(tick)
            yield from _calm(tick)
            yield from _latencies(tick)
            yield from _state(tick)
            yield from _quality(tick, self._quality)
            yield from _engine(tick)

    def _constants(self) -> Iterator[Metric]:
        slo = self._slo
        promised = {"ttft": slo.ttft_seconds, "itl": slo.itl_seconds}
        yield _gauges("mode", "One-hot mode", "mode", {m: m == self._mode for m in _MODES})
        yield _gauges("slo_threshold_seconds", "Latency that is promised", "slo", promised)
        objectives = dict.fromkeys(SLOS, slo.objective_ratio)
        yield _gauges("slo_objective_ratio", "Share that is promised", "slo", objectives)
        yield _gauge("queue_slo_requests", "Waiting requests that are allowed", slo.queue_requests)

    def _counters(self) -> Iterator[Metric]:
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=self._counts[name])
        name, text = "log_lines_lost", "Lines on standard error that nobody could take"
        yield CounterMetricFamily(_PREFIX + name, text, value=self._lost_log_lines())
        failures = self._tick.source_failures_total if self._tick else 0
        name, text = "source_failures", "Readings that failed"
        yield CounterMetricFamily(_PREFIX + name, text, value=failures)
        yield from self._changes.series("budget", "the selector")
        yield from self._calm_changes.series("calm_budget", "what calm steps obey")
        yield from self._reload_series()
        yield _gauge("tick_seconds", "CPU time of the last tick", self._tick_seconds)

    def _reload_series(self) -> Iterator[Metric]:
        name, text = "config_reloads", "Reloads of the configuration"
        reloads = CounterMetricFamily(_PREFIX + name, text, labels=["outcome"])
        for outcome in ("applied", "refused"):
            reloads.add_metric([outcome], self._reloads[outcome])
        yield reloads
        text = "0: the configuration file was refused and the one before is in force"
        yield _gauge("config_last_reload_successful", text, float(self._reload_ok))


def _budgets(tick: TickReport) -> Iterator[Metric]:
    acknowledged = tick.acknowledged or dict.fromkeys(PHASES)
    activations: dict[str, tuple[str, Mapping[Phase, int | None]]] = {
        "desired": ("Budget that the law asks for", tick.desired),
        "written": ("Budget in the shared table's selector", tick.written),
        "acknowledged": ("Budget of the rank that is furthest behind; NaN: none", acknowledged),
        "floor": ("Smallest allowed budget", tick.floors),
        "ceiling": ("Largest allowed budget", tick.ceilings),
    }
    for name, (text, values) in activations.items():
        yield _gauges(f"budget_{name}_activations", text, "phase", values)
    loss = "Predicted loss per token of the written budget"
    yield _gauges("predicted_loss_nats", loss, "phase", tick.predicted_losses)
    yield _gauge("generation", "Generation in the selector", tick.generation)


def _calm(tick: TickReport) -> Iterator[Metric]:
    """Yield what calm steps obey, which are the budgets of all steps where they have no other."""
    text = "Budget that the law asks for in calm steps"
    yield _gauges("calm_budget_desired_activations", text, "phase", tick.calm_desired)
    text = "Budget of calm steps in the shared table"
    yield _gauges("calm_budget_written_activations", text, "phase", tick.calm_written)
    written = tick.calm.written
    text = "A step with so many running requests is not calm; NaN: calm steps have no other budgets"
    limit = math.nan if written is None else written.running_requests
    yield _gauge("calm_running_requests", text, limit)
    text = "Predicted loss per token of the budget of calm steps"
    yield _gauges("calm_predicted_loss_nats", text, "phase", tick.calm_losses)
    text = "Share of the last minute's tokens served in calm steps; NaN: none were counted"
    ratios = {phase: tick.calm.ratios.get(phase) for phase in PHASES}
    yield _gauges("calm_tokens_ratio", text, "phase", ratios)
    text = "Predicted loss per token, calm and other steps by their share of the tokens"
    yield _gauges("expected_loss_nats", text, "phase", tick.expected_losses)


def _latencies(tick: TickReport) -> Iterator[Metric]:
    samples = tick.samples
    within = {slo: s.within_ratio if s else None for slo, s in samples.items()}
    yield _gauges("slo_attainment_ratio", "Share of the window within the SLO", "slo", within)
    events = {slo: s.events if s else 0 for slo, s in samples.items()}
    yield _gauges("slo_window_events", "Events in the window", "slo", events)
    quantiles = {slo: s.quantile_seconds if s else None for slo, s in samples.items()}
    text = "Estimated latency that the objective's share stays under"
    yield _gauges("latency_quantile_seconds", text, "slo", quantiles)
    burns = {"ttft": tick.burn_ratios["prefill"], "itl": tick.burn_ratios["decode"]}
    yield _gauges("burn_ratio", "Smoothed misses over allowed misses", "slo", burns)
    yield _gauges("error_ratio", "Excess that the phase reacts to", "phase", tick.excesses)
    yield _gauge("queue_requests", "Waiting requests of the busiest rank", tick.queue_requests)
    yield _gauge("running_requests", "Running requests of the busiest rank", tick.running_requests)


def _state(tick: TickReport) -> Iterator[Metric]:
    states = {state.value: state is tick.input_state for state in InputState}
    yield _gauges("input_state", "One-hot state of the readings", "state", states)
    reasons = GaugeMetricFamily(
        _PREFIX + "reason", "One-hot reason of the phase's budget", labels=["phase", "reason"]
    )
    for phase in PHASES:
        for reason in Reason:
            reasons.add_metric([phase, reason.value], float(tick.reasons[phase] is reason))
    yield reasons
    yield _saturation(tick.saturation_ratio)
    infeasible = Reason.INFEASIBLE in tick.reasons.values()
    yield _gauge("infeasible", "1: at the floor and violating for long", float(infeasible))
    yield _gauge("sample_age_seconds", "Age of the newest reading", tick.sample_age_seconds)


def _saturation(ratio: float) -> Metric:
    """Return the ratio, or no series at all: an autoscaler may take NaN for 0, and scale in."""
    text = (
        "0: full quality; up to 0.8: quality given up; 1: violating with nothing more that may be "
        "given up; absent: the input is stale"
    )
    family = GaugeMetricFamily(_PREFIX + "saturation_ratio", text)
    if not math.isnan(ratio):
        family.add_metric([], ratio)
    return family


def _quality(tick: TickReport, quality: QualitySettings) -> Iterator[Metric]:
    name, text = "below_full_seconds", "Time in which a rank with work served below its ceiling"
    yield CounterMetricFamily(_PREFIX + name, text, value=tick.below_full_seconds_total)
    text = "1: since the tick before, a rank with work served somebody below its ceiling"
    yield _gauge("below_full", text, float(tick.below_full))
    text = "Minutes below full quality within quality.below_full_window_hours"
    yield _gauge("below_full_minutes", text, tick.below_full_minutes)
    agreed = quality.below_full_minutes
    text = "Minutes below full quality that are agreed for that window; NaN: no such agreement"
    yield _gauge("below_full_agreed_minutes", text, math.nan if agreed is None else agreed)
    text = "1: a person has ended all trading of quality"
    yield _gauge("kill_switch", text, float(tick.kill_cause is not None))


def _engine(tick: TickReport) -> Iterator[Metric]:
    load = tick.load
    known = {
        "waiting_tokens": ("Prompt tokens of the longest queue", load and load.waiting_tokens),
        "token_usage_ratio": ("Filled share of the KV cache", load and load.token_usage_ratio),
        "generated_tokens_per_second": ("Sum over ranks", load and load.tokens_per_second),
        "decode_step_seconds": ("Mean step of the slowest rank", tick.decode_step_seconds),
    }
    for name, (text, value) in known.items():
        yield _gauge(name, f"{text}, from /v1/loads", math.nan if value is None else value)
    text = "Time of engine steps over the cost model's, as far as a law that looks ahead knows it"
    yield _gauges("step_time_ratio", text, "phase", tick.step_time_ratios)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value=value)


def _gauges(name: str, text: str, label: str, values: Mapping[_Key, float | None]) -> Metric:
    """Return one series for each label value; what is not known is NaN."""
    family = GaugeMetricFamily(_PREFIX + name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], math.nan if value is None else float(value))
    return family
