"""Data story: which sections of the shared table a mode reads, as an enforcement wants them."""

from __future__ import annotations

from typing import cast

import numpy as np

from sglang_alloc.allocation_mode import Mode, Phase, default_mode, mode_of_phase
from sglang_alloc.enforcement import EnforcementTables, PhaseRows
from sglang_alloc.enforcement_probe import ProbeRows
from sglang_alloc.shared_table import SharedTable


def enforcement_tables(table: SharedTable, mode: Mode) -> EnforcementTables:
    """Collect the rows of both phases; prefill uses its own rows where the table has them."""
    shape = table.shape
    is_union = mode == "union"
    decode = PhaseRows(
        _first(table, "union_quotas", "quotas") if is_union else table.section("quotas"),
        _optional(table, "union_thresholds" if is_union else "thresholds"),
        *_corrections(table, _mode_in(table, mode, "decode"), "decode"),
        mean_quotas=_optional(table, "threshold_quotas"),
    )
    prefill = PhaseRows(
        _first(table, "prefill_quotas", "quotas"),
        _optional_first(table, "prefill_thresholds", "thresholds"),
        *_corrections(table, _mode_in(table, mode, "prefill"), "prefill"),
        mean_quotas=_prefill_mean_quotas(table),
    )
    return EnforcementTables(
        mode=mode,
        top_k=shape.top_k,
        budget_min=shape.budget_min,
        budget_max=shape.budget_max,
        prefill=prefill,
        decode=decode,
        saliency=_optional(table, "saliency"),
        num_experts=shape.num_experts,
        prefill_mode=_mode_in(table, mode, "prefill"),
    )


def probe_rows(table: SharedTable) -> ProbeRows:
    """Collect the rows of a table of probes."""
    mean = "threshold_quotas" if table.has_section("threshold_quotas") else "quotas"
    return ProbeRows(table.section(mean), _optional(table, "references"), _optional(table, "gains"))


def _mode_in(table: SharedTable, mode: Mode, phase: Phase) -> Mode:
    return cast(Mode, mode_of_phase(mode, phase, table.has_section))


def _corrections(
    table: SharedTable, mode: Mode, phase: Phase
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return gains and references if they are this mode's: what is kept differs between modes.

    Gains and references belong to the default mode, `union_references` to mode `union`. They are
    those of decode's rows. Prefill has them too where it obeys those, and gains of its own
    where it has rows of its own.
    """
    if mode == "union":
        return None, _optional(table, "union_references")
    if mode != default_mode(table.has_section):
        return None, None
    rows = "prefill_thresholds" if mode == "threshold" else "prefill_quotas"
    if phase == "prefill" and table.has_section(rows):
        return _optional(table, "prefill_gains"), None
    return _optional(table, "gains"), _optional(table, "references")


def _optional(table: SharedTable, name: str) -> np.ndarray | None:
    return table.section(name) if table.has_section(name) else None


def _first(table: SharedTable, name: str, otherwise: str) -> np.ndarray:
    return table.section(name if table.has_section(name) else otherwise)


def _prefill_mean_quotas(table: SharedTable) -> np.ndarray | None:
    if table.has_section("prefill_thresholds"):
        return _optional(table, "prefill_threshold_quotas")
    return _optional(table, "threshold_quotas")


def _optional_first(table: SharedTable, name: str, otherwise: str) -> np.ndarray | None:
    return _optional(table, name) if table.has_section(name) else _optional(table, otherwise)
