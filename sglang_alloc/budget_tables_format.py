"""Contract 2, in memory: the arrays of the budget tables and every promise they make."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from sglang_alloc.errors import TableFormatError

MODEL_ID_MAX_BYTES = 255

Array = npt.NDArray[Any]

# Every array of the file: its dtype and its shape in L layers, K = top-k, N budgets, E experts.
REQUIRED_ARRAYS: dict[str, tuple[str, str]] = {
    "layer_ids": ("<i4", "L"),
    "budgets": ("<i4", "N"),
    "quotas": ("<i2", "NL"),
    "predicted_loss": ("<f4", "N"),
}
OPTIONAL_ARRAYS: dict[str, tuple[str, str]] = {
    "sensitivity": ("<f8", "LK"),
    "prefill_sensitivity": ("<f8", "LK"),
    "prefill_quotas": ("<i2", "NL"),
    "prefill_predicted_loss": ("<f4", "N"),
    "thresholds": ("<f4", "NL"),
    "threshold_quotas": ("<f4", "NL"),
    "threshold_predicted_loss": ("<f4", "N"),
    "prefill_thresholds": ("<f4", "NL"),
    "prefill_threshold_quotas": ("<f4", "NL"),
    "prefill_threshold_loss": ("<f4", "N"),
    "union_quotas": ("<i2", "NL"),
    "union_thresholds": ("<f4", "NL"),
    "union_references": ("<i2", "NL"),
    "union_predicted_loss": ("<f4", "N"),
    "gains": ("<f4", "NL"),
    "prefill_gains": ("<f4", "NL"),
    "references": ("<i2", "NL"),
    "saliency": ("<f4", "LE"),
}
ARRAYS = REQUIRED_ARRAYS | OPTIONAL_ARRAYS
QUOTA_ARRAYS = ("quotas", "prefill_quotas", "union_quotas")
# Arrays that mean nothing without another one, or one of two.
_NEEDS: dict[str, tuple[str, ...]] = {
    "prefill_quotas": ("prefill_predicted_loss",),
    "prefill_predicted_loss": ("prefill_quotas",),
    "union_quotas": ("union_predicted_loss",),
    "union_thresholds": ("union_predicted_loss",),
    "union_references": ("union_predicted_loss",),
    "union_predicted_loss": ("union_quotas", "union_thresholds"),
    "threshold_predicted_loss": ("thresholds",),
    "threshold_quotas": ("thresholds",),
    "prefill_threshold_loss": ("prefill_thresholds",),
    "prefill_threshold_quotas": ("prefill_thresholds",),
    "prefill_gains": ("gains",),
}


@dataclass(frozen=True, eq=False)
class BudgetTables:
    """What the offline path knows of one model: a row for every budget, full budget last.

    A budget is a number of routed-expert activations per token, summed over the MoE layers. Row n
    belongs to `budgets[n]`. Losses are in nats per token above the full model. Decode uses
    `quotas`, `thresholds` or the `union_` arrays, by the mode that is served; prefill uses the
    `prefill_` arrays where they are present, else decode's. `threshold_quotas` is the mean number
    of slots that each threshold was calibrated to keep. Mode `union` opens a step's set by
    `union_thresholds`, or by each token's best `union_quotas` where there are no such thresholds.

    A table of `probes` is for profiling alone: its rows are numbered from 1, in no order of size,
    and only the last one is the full model. In mode `threshold` it has no thresholds: the worker
    keeps `threshold_quotas` on average over each forward.
    """

    model_id: str
    fingerprint: str
    num_experts: int
    top_k: int
    layer_ids: Array
    budgets: Array
    quotas: Array
    predicted_loss: Array
    sensitivity: Array | None = None
    prefill_sensitivity: Array | None = None
    prefill_quotas: Array | None = None
    prefill_predicted_loss: Array | None = None
    thresholds: Array | None = None
    threshold_quotas: Array | None = None
    threshold_predicted_loss: Array | None = None
    prefill_thresholds: Array | None = None
    prefill_threshold_quotas: Array | None = None
    prefill_threshold_loss: Array | None = None
    union_quotas: Array | None = None
    union_thresholds: Array | None = None
    union_references: Array | None = None
    union_predicted_loss: Array | None = None
    gains: Array | None = None
    prefill_gains: Array | None = None
    references: Array | None = None
    saliency: Array | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)
    probes: bool = False

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers."""
        return int(self.layer_ids.shape[0])

    @property
    def budget_min(self) -> int:
        """The smallest budget that has a row."""
        return int(self.budgets[0])

    @property
    def budget_max(self) -> int:
        """The full budget, L * top_k."""
        return int(self.budgets[-1])

    def arrays(self) -> dict[str, Array]:
        """Return the arrays that are present, by field name, in the dtypes of the file."""
        present = {name: getattr(self, name) for name in ARRAYS}
        return {
            name: np.ascontiguousarray(array, dtype=ARRAYS[name][0])
            for name, array in present.items()
            if array is not None
        }

    def validate(self) -> None:
        """Raise `TableFormatError`, naming the field, unless every promise of the format holds."""
        _check_scalars(self)
        _check_shapes(self)
        _check_layer_ids(self)
        if self.probes:
            _check_probe_numbers(self)
        else:
            _check_budgets(self)
            _check_companions(self)
        for name in QUOTA_ARRAYS:
            if getattr(self, name) is not None:
                _check_quotas(self, name)
        for name in ("references", "union_references"):
            if getattr(self, name) is not None:
                _check_slots(self, name, getattr(self, name))
        for name in ("threshold_quotas", "prefill_threshold_quotas"):
            if getattr(self, name) is not None:
                _check_mean_quotas(self, name)


def _check_scalars(tables: BudgetTables) -> None:
    id_bytes = len(tables.model_id.encode())
    if not 1 <= id_bytes <= MODEL_ID_MAX_BYTES:
        refuse("model_id", f"1 to {MODEL_ID_MAX_BYTES} bytes of UTF-8", f"{id_bytes} bytes")
    if not re.fullmatch("[0-9a-f]{64}", tables.fingerprint):
        refuse("fingerprint", "64 lower-case hex digits", repr(tables.fingerprint))
    if not 1 <= tables.top_k <= tables.num_experts:
        refuse("top_k", f"1 to num_experts ({tables.num_experts})", str(tables.top_k))


def _check_shapes(tables: BudgetTables) -> None:
    for name in ("layer_ids", "budgets"):
        array = getattr(tables, name)
        if array.ndim != 1 or array.size == 0:
            refuse(name, "one dimension, not empty", f"shape {array.shape}")
    sizes = {
        "L": tables.num_layers,
        "K": tables.top_k,
        "N": int(tables.budgets.size),
        "E": tables.num_experts,
    }
    for name, array in tables.arrays().items():
        expected = tuple(sizes[letter] for letter in ARRAYS[name][1])
        if array.shape != expected:
            refuse(name, f"shape {expected}", f"shape {array.shape}")
        if not np.isfinite(array).all():
            refuse(name, "finite numbers only", "NaN or infinity")


def _check_layer_ids(tables: BudgetTables) -> None:
    layer_ids = tables.layer_ids
    if layer_ids[0] < 0 or (np.diff(layer_ids) <= 0).any():
        refuse("layer_ids", "ascending layer numbers from 0", str(layer_ids.tolist()))


def _check_probe_numbers(tables: BudgetTables) -> None:
    budgets = tables.budgets
    if budgets[0] != 1 or (np.diff(budgets) != 1).any():
        refuse("budgets", "probe numbers from 1 on", f"{budgets[0]} to {budgets[-1]}")


def _check_companions(tables: BudgetTables) -> None:
    for name, companions in _NEEDS.items():
        if getattr(tables, name) is None:
            continue
        if all(getattr(tables, companion) is None for companion in companions):
            refuse(name, f"{' or '.join(companions)} beside it", "none")


def _check_budgets(tables: BudgetTables) -> None:
    budgets = tables.budgets
    full = tables.num_layers * tables.top_k
    if (np.diff(budgets) != 1).any() or budgets[-1] != full or budgets[0] < tables.num_layers:
        refuse(
            "budgets",
            f"every integer from at least {tables.num_layers} (one expert per layer) to {full}",
            f"{budgets.size} values from {budgets[0]} to {budgets[-1]}",
        )


def _check_slots(tables: BudgetTables, name: str, slots: Array) -> None:
    if slots.min() < 1 or slots.max() > tables.top_k:
        refuse(name, f"1 to {tables.top_k}", f"{slots.min()} to {slots.max()}")


def _check_quotas(tables: BudgetTables, name: str) -> None:
    quotas: Array = getattr(tables, name)
    _check_slots(tables, name, quotas)
    if not tables.probes:
        _check_spent(tables, name, quotas.sum(axis=1, dtype=np.int64), tables.budgets)
    if (quotas[-1] != tables.top_k).any():
        refuse(name, f"{tables.top_k} in every layer of the last row", str(quotas[-1].tolist()))


def _check_mean_quotas(tables: BudgetTables, name: str) -> None:
    """Mean slots may be fractions; a millionth of a slot is rounding."""
    quotas: Array = getattr(tables, name)
    _check_slots(tables, name, quotas)
    if not tables.probes:
        _check_spent(
            tables, name, quotas.sum(axis=1, dtype=np.float64), tables.budgets * (1 + 1e-6)
        )


def _check_spent(tables: BudgetTables, name: str, spent: Array, allowed: Array) -> None:
    over = np.flatnonzero(spent > allowed)
    if over.size:
        row = int(over[0])
        refuse(name, f"a sum of at most {tables.budgets[row]} in row {row}", str(spent[row]))


def refuse(name: str, expected: str, found: str) -> NoReturn:
    """Raise the `TableFormatError` of one field."""
    raise TableFormatError(f"{name}: expected {expected}, found {found}.")
