"""Data story: which sections of the shared table a mode reads, as an enforcement wants them."""

from __future__ import annotations

import numpy as np

from sglang_alloc.enforcement import EnforcementTables, PhaseRows
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.shared_table import SharedTable
from sglang_alloc.worker_settings import Mode


def choose_mode(asked: Mode | None, table: SharedTable) -> Mode:
    """Return the mode to serve in; raise ConfigurationError when the table cannot support it."""
    has_thresholds = table.has_section("thresholds")
    if asked is None:
        return "threshold" if has_thresholds else "layer"
    if asked == "threshold" and not has_thresholds:
        raise ConfigurationError(
            "mode 'threshold' was asked for, but the table holds no calibrated thresholds: "
            "use mode 'layer' or 'token', or publish a table with thresholds"
        )
    return asked


def enforcement_tables(table: SharedTable, mode: Mode) -> EnforcementTables:
    """Collect the rows of both phases; prefill uses its own rows where the table has them."""
    shape = table.shape
    decode = PhaseRows(
        table.section("quotas"), _optional(table, "thresholds"), _optional(table, "gains")
    )
    prefill = PhaseRows(
        _first(table, "prefill_quotas", "quotas"),
        _optional_first(table, "prefill_thresholds", "thresholds"),
        _optional(table, "gains"),
    )
    return EnforcementTables(
        mode=mode,
        top_k=shape.top_k,
        budget_min=shape.budget_min,
        budget_max=shape.budget_max,
        prefill=prefill,
        decode=decode,
        saliency=_optional(table, "saliency"),
    )


def _optional(table: SharedTable, name: str) -> np.ndarray | None:
    return table.section(name) if table.has_section(name) else None


def _first(table: SharedTable, name: str, otherwise: str) -> np.ndarray:
    return table.section(name if table.has_section(name) else otherwise)


def _optional_first(table: SharedTable, name: str, otherwise: str) -> np.ndarray | None:
    return _optional(table, name) if table.has_section(name) else _optional(table, otherwise)
