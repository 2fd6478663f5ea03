"""Contract 2, the offline story's product: one row of per-layer quotas for every budget (.npz)."""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from sglang_alloc.atomic_file import replace_file
from sglang_alloc.errors import TableFormatError

FORMAT_VERSION = 1
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
_SCALARS = ("format_version", "model_id", "fingerprint", "num_experts", "top_k", "provenance")


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
            _refuse(
                "prefill_quotas and prefill_predicted_loss",
                "both or neither",
                "only one of them",
            )
        if self.prefill_quotas is not None:
            _check_quotas(self, "prefill_quotas")


def save_budget_tables(path: Path, tables: BudgetTables) -> None:
    """Validate `tables` and write them to `path` in one step.

    Raises:
        TableFormatError: a field breaks the format, or the file cannot be written.
    """
    tables.validate()
    content = io.BytesIO()
    scalars = {
        "format_version": np.int64(FORMAT_VERSION),
        "model_id": np.str_(tables.model_id),
        "fingerprint": np.str_(tables.fingerprint),
        "num_experts": np.int64(tables.num_experts),
        "top_k": np.int64(tables.top_k),
        "provenance": np.str_(json.dumps(dict(tables.provenance), sort_keys=True)),
    }
    fields: dict[str, Any] = scalars | tables.arrays()
    np.savez_compressed(content, **fields)
    try:
        replace_file(path, content.getvalue(), mode=0o644)
    except OSError as error:
        raise TableFormatError(
            f"Cannot write the budget tables to {path}: {error.strerror}. "
            "Choose a folder that this user can write to and that has room."
        ) from error


def load_budget_tables(path: Path) -> BudgetTables:
    """Read and validate the budget tables in `path`; the arrays are read-only.

    Raises:
        TableFormatError: the file is missing, damaged, of another version, or breaks the format.
    """
    fields = _read_arrays(path)
    try:
        _check_version(fields)
        tables = _from_fields(fields)
        tables.validate()
    except TableFormatError as error:
        raise TableFormatError(f"{path} is not a usable budget table: {error}") from error
    return tables


def _read_arrays(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise TableFormatError(
            f"There is no budget table at {path}. Check the path, or make one by profiling."
        ) from error
    except OSError as error:
        raise TableFormatError(
            f"Cannot read the budget table {path}: {error.strerror or error}."
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise TableFormatError(
            f"{path} is not an intact .npz file of budget tables ({error}). "
            "Copy it again from where it was made, or make it anew."
        ) from error


def _check_version(fields: Mapping[str, Array]) -> None:
    if "format_version" not in fields:
        _refuse("format_version", "to be present", f"only {sorted(fields)}")
    version = fields["format_version"]
    if version.ndim != 0 or version.dtype.kind not in "iu" or int(version) != FORMAT_VERSION:
        _refuse("format_version", str(FORMAT_VERSION), str(version))


def _from_fields(fields: Mapping[str, Array]) -> BudgetTables:
    required = {*_SCALARS, *REQUIRED_ARRAYS}
    missing, unknown = required - set(fields), set(fields) - required - set(OPTIONAL_ARRAYS)
    if missing:
        _refuse("fields", "all required ones", f"none named {', '.join(sorted(missing))}")
    if unknown:
        _refuse("fields", "only known ones", f"also {', '.join(sorted(unknown))}")
    arrays = {name: _in_dtype(name, fields[name]) for name in ARRAYS if name in fields}
    return BudgetTables(
        model_id=str(fields["model_id"]),
        fingerprint=str(fields["fingerprint"]),
        num_experts=_integer("num_experts", fields["num_experts"]),
        top_k=_integer("top_k", fields["top_k"]),
        provenance=_provenance(str(fields["provenance"])),
        **arrays,
    )


def _integer(name: str, value: Array) -> int:
    if value.ndim != 0 or value.dtype.kind not in "iu":
        _refuse(name, "one integer", f"{value.dtype} of shape {value.shape}")
    return int(value)


def _in_dtype(name: str, array: Array) -> Array:
    expected = np.dtype(ARRAYS[name][0])
    if array.dtype != expected:
        _refuse(name, f"dtype {expected}", str(array.dtype))
    array.flags.writeable = False
    return array


def _provenance(text: str) -> dict[str, object]:
    try:
        provenance = json.loads(text)
    except json.JSONDecodeError as error:
        _refuse("provenance", "JSON", str(error))
    if not isinstance(provenance, dict):
        _refuse("provenance", "a JSON object", type(provenance).__name__)
    return provenance


def _check_scalars(tables: BudgetTables) -> None:
    id_bytes = len(tables.model_id.encode())
    if not 1 <= id_bytes <= MODEL_ID_MAX_BYTES:
        _refuse("model_id", f"1 to {MODEL_ID_MAX_BYTES} bytes of UTF-8", f"{id_bytes} bytes")
    if not re.fullmatch("[0-9a-f]{64}", tables.fingerprint):
        _refuse("fingerprint", "64 lower-case hex digits", repr(tables.fingerprint))
    if not 1 <= tables.top_k <= tables.num_experts:
        _refuse("top_k", f"1 to num_experts ({tables.num_experts})", str(tables.top_k))


def _check_shapes(tables: BudgetTables) -> None:
    for name in ("layer_ids", "budgets"):
        array = getattr(tables, name)
        if array.ndim != 1 or array.size == 0:
            _refuse(name, "one dimension, not empty", f"shape {array.shape}")
    sizes = {
        "L": tables.num_layers,
        "K": tables.top_k,
        "N": int(tables.budgets.size),
        "E": tables.num_experts,
    }
    for name, array in tables.arrays().items():
        expected = tuple(sizes[letter] for letter in ARRAYS[name][1])
        if array.shape != expected:
            _refuse(name, f"shape {expected}", f"shape {array.shape}")
        if not np.isfinite(array).all():
            _refuse(name, "finite numbers only", "NaN or infinity")


def _check_budgets(tables: BudgetTables) -> None:
    layer_ids, budgets = tables.layer_ids, tables.budgets
    if layer_ids[0] < 0 or (np.diff(layer_ids) <= 0).any():
        _refuse("layer_ids", "ascending layer numbers from 0", str(layer_ids.tolist()))
    full = tables.num_layers * tables.top_k
    if (np.diff(budgets) != 1).any() or budgets[-1] != full or budgets[0] < tables.num_layers:
        _refuse(
            "budgets",
            f"every integer from at least {tables.num_layers} (one expert per layer) to {full}",
            f"{budgets.size} values from {budgets[0]} to {budgets[-1]}",
        )


def _check_quotas(tables: BudgetTables, name: str) -> None:
    quotas: Array = getattr(tables, name)
    if quotas.min() < 1 or quotas.max() > tables.top_k:
        _refuse(name, f"1 to {tables.top_k}", f"{quotas.min()} to {quotas.max()}")
    spent = quotas.sum(axis=1, dtype=np.int64)
    over = np.flatnonzero(spent > tables.budgets)
    if over.size:
        row = int(over[0])
        _refuse(name, f"a sum of at most {tables.budgets[row]} in row {row}", str(spent[row]))
    if (quotas[-1] != tables.top_k).any():
        _refuse(name, f"{tables.top_k} in every layer of the last row", str(quotas[-1].tolist()))


def _refuse(name: str, expected: str, found: str) -> NoReturn:
    raise TableFormatError(f"{name}: expected {expected}, found {found}.")
