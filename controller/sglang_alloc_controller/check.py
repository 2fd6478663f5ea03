"""Control story, before the first step: `sglang-alloc-controller check` tries every part once."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.errors import AllocError
from sglang_alloc.shared_table import SharedTable
from sglang_alloc_controller.bucket_edges import check_edges
from sglang_alloc_controller.quality_bounds import budget_ranges
from sglang_alloc_controller.samples import PHASES, Reading
from sglang_alloc_controller.series_fold import unseen_priorities
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.sglang_metrics import SGLangMetrics
from sglang_alloc_controller.source import open_source


class Finding(NamedTuple):
    """One line of the check."""

    level: str
    """ok, unknown or failed."""
    sentence: str


def findings(settings: Settings) -> Iterator[Finding]:
    """Check the shared table, the source and the bucket edges, each on its own."""
    yield from _guarded(lambda: _table(settings))
    yield from _guarded(lambda: _source(settings))


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
    finally:
        table.close()
    for phase in PHASES:
        low, high = ranges[phase].floor, ranges[phase].ceiling
        level = "ok" if low < high else "unknown"
        yield Finding(level, f"The {phase} budget moves between {low} and {high}.")


def _source(settings: Settings) -> Iterator[Finding]:
    source = open_source(settings.source, time.monotonic)
    try:
        reading = source.read()
        missing = source.missing_series() if isinstance(source, SGLangMetrics) else []
    finally:
        source.close()
    yield _freshness(settings, reading)
    if missing:
        yield Finding("unknown", f"{settings.source.url} does not show {', '.join(missing)} yet.")
    unseen = unseen_priorities(reading, settings.source)
    if unseen is not None:
        yield Finding("unknown", unseen)
    for finding in check_edges(reading, settings.slo):
        level = "ok" if finding.present else "failed" if finding.known else "unknown"
        yield Finding(level, finding.sentence)


def _freshness(settings: Settings, reading: Reading) -> Finding:
    age_seconds = time.monotonic() - reading.taken_at_seconds
    limit_seconds = settings.freshness.stale_after_seconds
    sentence = f"{settings.source.url} answers; its values are {age_seconds:.1f} s old."
    if age_seconds <= limit_seconds:
        return Finding("ok", sentence)
    return Finding(
        "failed",
        f"{sentence} That is over freshness.stale_after_seconds ({limit_seconds:g}): raise it "
        "above the scrape interval, or scrape more often.",
    )
