"""Control story, after the last step: the ticks just past, as points for the live page."""

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable

from sglang_alloc_controller.samples import PHASES, SLOS
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.shown_url import shown_url
from sglang_alloc_controller.tick_report import TickReport

# A point a second for the last quarter of an hour, one every half minute for the last twelve.
_SPANS = {"minutes": (1.0, 900), "hours": (30.0, 1440)}


class PageHistory:
    """Points of the last ticks in two resolutions; one thread adds, others read."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        """Take what tells the settings in force."""
        self._settings = settings
        self._lock = threading.Lock()
        self._points: dict[str, deque[str]] = {
            name: deque(maxlen=count) for name, (_, count) in _SPANS.items()
        }
        self._added_at_seconds = dict.fromkeys(_SPANS, -math.inf)

    def add(self, tick: TickReport) -> None:
        """Keep the tick where its resolution has room for it."""
        text = None
        for name, (apart_seconds, _) in _SPANS.items():
            if tick.now_seconds - self._added_at_seconds[name] < apart_seconds - 1e-6:
                continue
            self._added_at_seconds[name] = tick.now_seconds
            text = text or json.dumps(_point(tick, time.time()), separators=(",", ":"))
            with self._lock:
                self._points[name].append(text)

    def answer(self, span: str) -> bytes:
        """Return the JSON that the page draws; an unknown span is the short one."""
        name = span if span in _SPANS else "minutes"
        with self._lock:
            points = ",".join(self._points[name])
        head = json.dumps(self._promises(), separators=(",", ":"))
        return f'{head[:-1]},"points":[{points}]}}'.encode()

    def _promises(self) -> dict[str, object]:
        settings = self._settings()
        return {
            "mode": settings.mode,
            "table": settings.table,
            "source": shown_url(settings.source.url),
            "ttft_seconds": settings.slo.ttft_seconds,
            "itl_seconds": settings.slo.itl_seconds,
            "objective_ratio": settings.slo.objective_ratio,
            "queue_slo_requests": settings.slo.queue_requests,
            "below_full_agreed_minutes": settings.quality.below_full_minutes,
            "below_full_window_hours": settings.quality.below_full_window_hours,
        }


def _point(tick: TickReport, wall_seconds: float) -> dict[str, object]:
    acknowledged, calm = tick.acknowledged, tick.calm.written
    return {
        "t": round(wall_seconds, 2),
        "state": tick.input_state.value,
        "reason": [tick.reasons[phase].value for phase in PHASES],
        "desired": [tick.desired[phase] for phase in PHASES],
        "written": [tick.written[phase] for phase in PHASES],
        "calm": [tick.calm_written[phase] for phase in PHASES] if calm else None,
        "calm_running": calm and calm.running_requests,
        "calm_share": [_number(tick.calm.ratios.get(phase)) for phase in PHASES],
        "acknowledged": acknowledged and [acknowledged[phase] for phase in PHASES],
        "bounds": [[tick.floors[phase], tick.ceilings[phase]] for phase in PHASES],
        "within": [_within(tick, slo) for slo in SLOS],
        "queue": _number(tick.queue_requests),
        "running": _number(tick.running_requests),
        "age": _number(tick.sample_age_seconds),
        "loss": [_number(tick.predicted_losses[phase]) for phase in PHASES],
        "expected_loss": [_number(tick.expected_losses[phase]) for phase in PHASES],
        "saturation": _number(tick.saturation_ratio),
        "below_full_minutes": _number(tick.below_full_minutes),
        "actor": tick.actor,
        "killed": tick.kill_cause,
        "error": tick.source_error,
    }


def _within(tick: TickReport, slo: str) -> float | None:
    sample = next((one for name, one in tick.samples.items() if name == slo), None)
    return _number(sample.within_ratio) if sample else None


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 5)
