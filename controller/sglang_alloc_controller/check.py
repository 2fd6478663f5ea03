"""Control story, before the first step: `sglang-alloc-controller check` tries every part once."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.errors import AllocError, ConfigurationError, SharedTableError
from sglang_alloc.shared_table import SharedTable
from sglang_alloc_controller.bucket_edges import check_edges
from sglang_alloc_controller.decision_log import require_writable
from sglang_alloc_controller.http_permit import Permit
from sglang_alloc_controller.metrics_server import require_free
from sglang_alloc_controller.quality_bounds import NO_COST_MODEL, budget_ranges, largest_loss
from sglang_alloc_controller.samples import PHASES, Reading
from sglang_alloc_controller.series_fold import unseen_priorities
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.sglang_metrics import SGLangMetrics
from sglang_alloc_controller.shown_url import shown_url
from sglang_alloc_controller.source import open_source

# A controller beats at least once a second.
_BEATS_WITHIN_NS = 5_000_000_000


class Finding(NamedTuple):
    """One line of the check."""

    level: str
    """ok, note, unknown or failed."""
    sentence: str


def findings(settings: Settings) -> Iterator[Finding]:
    """Check the shared table, the source, the bucket edges and what is served and written."""
    yield from _guarded(lambda: _table(settings))
    yield from _guarded(lambda: _source(settings))
    yield from _guarded(lambda: _orders(settings))
    yield from _guarded(lambda: _address(settings))
    yield from _guarded(lambda: _decision_log(settings))


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except AllocError as error:
        yield Finding("failed", str(error))


def _table(settings: Settings) -> Iterator[Finding]:
    table = SharedTable.open(Path(settings.table), writable=False)
    try:
        shape = table.shape
        yield Finding(
            "ok",
            f"{settings.table} is a shared table of {table.model_id} with budgets from "
            f"{shape.budget_min} to {shape.budget_max}.",
        )
        ranges = budget_ranges(table, settings)
        losses = {phase: largest_loss(table, phase, ranges[phase]) for phase in PHASES}
    finally:
        table.close()
    for phase in PHASES:
        low, high = ranges[phase].floor, ranges[phase].ceiling
        level = "ok" if low < high else "unknown"
        yield Finding(
            level,
            f"The {phase} budget moves between {low} and {high}, predicted loss up to "
            f"{losses[phase]:.3g} nats per token.",
        )
    if settings.quality.max_predicted_loss is None:
        yield Finding(
            "note",
            "quality.max_predicted_loss is not set: no predicted loss is too much, down to the "
            "smallest budget that the table and the floors in the settings allow.",
        )
    else:
        yield Finding(
            "note",
            "quality.max_predicted_loss bounds each phase by itself: with both at their floors "
            f"{sum(losses.values()):.3g} nats per token may be lost together.",
        )
    if settings.quality.cost_model is None and settings.mode != "fixed":
        yield Finding("note", NO_COST_MODEL)


def _source(settings: Settings) -> Iterator[Finding]:
    source = open_source(settings.source, time.monotonic)
    try:
        reading = source.read()
        missing = source.missing_series() if isinstance(source, SGLangMetrics) else []
    finally:
        source.close()
    yield _freshness(settings, reading)
    if missing:
        yield Finding(
            "unknown", f"{shown_url(settings.source.url)} does not show {', '.join(missing)} yet."
        )
    yield from _loads(settings, reading)
    unseen = unseen_priorities(reading, settings.source)
    if unseen is not None:
        yield Finding("unknown", unseen)
    for finding in check_edges(reading, settings.slo):
        level = "ok" if finding.present else "failed" if finding.known else "unknown"
        yield Finding(level, finding.sentence)


def _loads(settings: Settings, reading: Reading) -> Iterator[Finding]:
    """Tell what /v1/loads leaves unknown, or knows of ranks that /metrics does not show."""
    source, ranks = settings.source, len(reading.rank_times)
    if source.kind == "sglang" and source.loads and reading.load is None:
        yield Finding(
            "note",
            f"{shown_url(source.url)} does not offer /v1/loads, or not to us: the queue is the "
            "gauge of /metrics, which moves every --decode-log-interval decode steps (40) and with "
            "each prefill, and a scheduler that hangs is not told from an idle one.",
        )
    if reading.prefill_tokens is not None and ranks > reading.engines:
        yield Finding(
            "unknown",
            f"/v1/loads names {ranks} data-parallel ranks, and /metrics counts the prompt tokens "
            f"of {reading.engines} so far. If it stays like that they run on other nodes, and the "
            "law takes the load of all for that of these: read every node's /metrics through "
            "Prometheus (source.kind: prometheus).",
        )


def _orders(settings: Settings) -> Iterator[Finding]:
    permit = Permit(settings.http.host, settings.control, os.environ)
    if permit.needs_token:
        yield Finding("ok", "The orders by HTTP need the token, which is there.")


def _address(settings: Settings) -> Iterator[Finding]:
    try:
        require_free(settings.http)
    except ConfigurationError as error:
        pid = _running_controller(settings)
        if pid is None:
            raise
        yield Finding(
            "unknown", f"{error} A controller of this table runs (pid {pid}); it may be its own."
        )
        return
    yield Finding("ok", f"http.port {settings.http.port} can be bound on {settings.http.host}.")


def _running_controller(settings: Settings) -> int | None:
    """Return the pid of the controller that writes the table now, None: there is none."""
    try:
        table = SharedTable.open(Path(settings.table), writable=False)
    except SharedTableError:
        return None
    try:
        age_ns = time.monotonic_ns() - table.heartbeat_ns()
        return table.writer_pid() if age_ns < _BEATS_WITHIN_NS else None
    finally:
        table.close()


def _decision_log(settings: Settings) -> Iterator[Finding]:
    require_writable(settings.decision_log)
    if settings.decision_log.path is not None:
        yield Finding("ok", f"{settings.decision_log.path} can be written.")


def _freshness(settings: Settings, reading: Reading) -> Finding:
    age_seconds = time.monotonic() - reading.taken_at_seconds
    limit_seconds = settings.freshness.stale_after_seconds
    sentence = f"{shown_url(settings.source.url)} answers; its values are {age_seconds:.1f} s old."
    if age_seconds <= limit_seconds:
        return Finding("ok", sentence)
    return Finding(
        "failed",
        f"{sentence} That is over freshness.stale_after_seconds ({limit_seconds:g}): raise it "
        "above the scrape interval, or scrape more often.",
    )
