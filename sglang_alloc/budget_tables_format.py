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
    "prefill_quotas": ("<i2", "NL"),
    "prefill_predicted_loss": ("<f4", "N"),
    "thresholds": ("<f4", "NL"),
    "prefill_thresholds": ("<f4", "NL"),
    "gains": ("<f4", "NL"),
    "saliency": ("<f4", "LE"),
}
ARRAYS = REQUIRED_ARRAYS | OPTIONAL_ARRAYS


@dataclass(frozen=True, eq=False)
class BudgetTables:
    """What the offline path knows of one model: a row for every budget, full budget last.

    A budget is a number of routed-expert activations per token, summed over the MoE layers. Row n
    belongs to `budgets[n]`. Losses are in nats per token above the full model. Decode uses
    `quotas` and `thresholds`; prefill uses the `prefill_` arrays where they are present, else the
    same ones.
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
    prefill_quotas: Array | None = None
    prefill_predicted_loss: Array | None = None
    thresholds: Array | None = None
    prefill_thresholds: Array | None = None
    gains: Array | None = None
    saliency: Array | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)

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
        _check_budgets(self)
        _check_quotas(self, "quotas")
        if (self.prefill_quotas is None) != (self.prefill_predicted_loss is None):
            refuse(
                "prefill_quotas and prefill_predicted_loss",
                "both or neither",
                "only one of them",
            )
        if self.prefill_quotas is not None:
            _check_quotas(self, "prefill_quotas")


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


def _check_budgets(tables: BudgetTables) -> None:
    layer_ids, budgets = tables.layer_ids, tables.budgets
    if layer_ids[0] < 0 or (np.diff(layer_ids) <= 0).any():
        refuse("layer_ids", "ascending layer numbers from 0", str(layer_ids.tolist()))
    full = tables.num_layers * tables.top_k
    if (np.diff(budgets) != 1).any() or budgets[-1] != full or budgets[0] < tables.num_layers:
        refuse(
            "budgets",
            f"every integer from at least {tables.num_layers} (one expert per layer) to {full}",
            f"{budgets.size} values from {budgets[0]} to {budgets[-1]}",
        )


def _check_quotas(tables: BudgetTables, name: str) -> None:
    quotas: Array = getattr(tables, name)
    if quotas.min() < 1 or quotas.max() > tables.top_k:
        refuse(name, f"1 to {tables.top_k}", f"{quotas.min()} to {quotas.max()}")
    spent = quotas.sum(axis=1, dtype=np.int64)
    over = np.flatnonzero(spent > tables.budgets)
    if over.size:
        row = int(over[0])
        refuse(name, f"a sum of at most {tables.budgets[row]} in row {row}", str(spent[row]))
    if (quotas[-1] != tables.top_k).any():
        refuse(name, f"{tables.top_k} in every layer of the last row", str(quotas[-1].tolist()))


def refuse(name: str, expected: str, found: str) -> NoReturn:
    """Raise the `TableFormatError` of one field."""
    raise TableFormatError(f"{name}: expected {expected}, found {found}.")
