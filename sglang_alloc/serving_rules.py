"""Data story, step 0: whether a table can be served with these settings, and in which mode.

The same rules before a server is started (`sglang-alloc serve`) and in each of its processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.allocation_mode import (
    MODES,
    Mode,
    Probe,
    default_mode,
    probe_of_note,
    require_support,
)
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.priority_floors import PRIORITY_FLOORS_VARIABLE, require_rising
from sglang_alloc.shared_table import SharedTable
from sglang_alloc.worker_settings import (
    CORRECT_DRIFT_VARIABLE,
    FALLBACK_VARIABLE,
    WorkerSettings,
)


class TableFacts(NamedTuple):
    """What a table says of itself, published or about to be; budgets in activations per token."""

    path: Path  # of the shared table
    model_id: str
    mode_note: str
    has_section: Callable[[str], bool]
    budget_min: int
    budget_max: int


class _Asked(NamedTuple):
    """What a setting gives a budget for, and the words that it may be given instead."""

    what: str
    words: str


_FALLBACK = _Asked(f"fallback ({FALLBACK_VARIABLE})", "full, hold")


def facts_of(table: SharedTable) -> TableFacts:
    """Return what a published table says of itself."""
    shape = table.shape
    return TableFacts(
        *(table.path, table.model_id, table.mode_note, table.has_section),
        *(shape.budget_min, shape.budget_max),
    )


def mode_to_serve(settings: WorkerSettings, table: TableFacts) -> Mode:
    """Return the mode to serve in.

    Raises:
        ConfigurationError: the table cannot be served with these settings.
    """
    probe = probe_of_note(table.mode_note)
    if probe is not None:
        mode = _profiled_mode(probe, settings, table)  # by rows of its own: it needs no section
    else:
        mode = _asked_mode(settings, table)
        require_support(mode, table.has_section, table.model_id)
    if settings.correct_drift:
        _require_calibrated_thresholds(mode, table)
    if settings.fallback.kind == "budget":
        _require_row(settings.fallback.prefill_budget, table, _FALLBACK)
        _require_row(settings.fallback.decode_budget, table, _FALLBACK)
    for floor in settings.priority_floors:
        if floor.budget is not None:
            asked = f"floor of priority {floor.priority} ({PRIORITY_FLOORS_VARIABLE})"
            _require_row(floor.budget, table, _Asked(asked, "full"))
    require_rising(settings.priority_floors, table.budget_max)
    return mode


def _profiled_mode(probe: Probe, settings: WorkerSettings, table: TableFacts) -> Mode:
    """Return the mode of a table of probes, which is for the profiler alone."""
    if settings.profile_folder is None:
        raise ConfigurationError(
            f"{table.path} is a table of probes, made to profile {table.model_id}: it cannot be "
            "served. Publish budget tables with `sglang-alloc publish`."
        )
    return probe.mode


def _asked_mode(settings: WorkerSettings, table: TableFacts) -> Mode:
    """Return the mode that was asked for, or the table's.

    A table that was published for one mode is served in that one, because the controller takes its
    predicted loss for what the budgets cost.
    """
    asked, note = settings.mode, table.mode_note
    if note not in MODES:
        return asked or default_mode(table.has_section)
    if asked not in {None, note}:
        raise ConfigurationError(
            f"Mode {asked} was asked for, but {table.path} was published for mode {note}, which "
            "the controller counts on. Publish it for this mode: sglang-alloc publish TABLES.npz "
            f"--mode {asked}"
        )
    return note


def _require_calibrated_thresholds(mode: Mode, table: TableFacts) -> None:
    if mode != "threshold" or not table.has_section("threshold_quotas"):
        raise ConfigurationError(
            f"--correct-drift ({CORRECT_DRIFT_VARIABLE}) moves calibrated thresholds, but "
            f"{table.path} is served in mode {mode} or does not say how many slots its thresholds "
            "keep. Leave it out, or calibrate the tables again."
        )


def _require_row(budget: int, table: TableFacts, asked: _Asked) -> None:
    if not table.budget_min <= budget <= table.budget_max:
        raise ConfigurationError(
            f"The {asked.what} of {budget} activations per token has no row in the table of "
            f"{table.model_id}, which covers {table.budget_min} to {table.budget_max}. Use "
            f"{asked.words} or such a budget."
        )
