"""Contract 2, the offline story's product: one row of per-layer quotas for every budget (.npz)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sglang_alloc.budget_tables_format import (
    ARRAYS,
    OPTIONAL_ARRAYS,
    REQUIRED_ARRAYS,
    Array,
    BudgetTables,
    refuse,
)
from sglang_alloc.errors import TableFormatError
from sglang_alloc.npz_file import read_npz, write_npz

__all__ = ["ARRAYS", "FORMAT_VERSION", "BudgetTables", "load_budget_tables", "save_budget_tables"]

FORMAT_VERSION = 1
_SCALARS = ("format_version", "model_id", "fingerprint", "num_experts", "top_k", "provenance")


def save_budget_tables(path: Path, tables: BudgetTables) -> None:
    """Validate `tables` and write them to `path` in one step.

    Raises:
        TableFormatError: a field breaks the format, or the file cannot be written.
    """
    tables.validate()
    if tables.probes:
        refuse("probes", "budget tables", "a table of probes, which is published, never saved")
    scalars = {
        "format_version": np.int64(FORMAT_VERSION),
        "model_id": np.str_(tables.model_id),
        "fingerprint": np.str_(tables.fingerprint),
        "num_experts": np.int64(tables.num_experts),
        "top_k": np.int64(tables.top_k),
        "provenance": np.str_(json.dumps(dict(tables.provenance), sort_keys=True)),
    }
    fields: dict[str, Any] = scalars | tables.arrays()
    write_npz(path, fields, "budget tables")


def load_budget_tables(path: Path) -> BudgetTables:
    """Read and validate the budget tables in `path`; the arrays are read-only.

    Raises:
        TableFormatError: the file is missing, damaged, of another version, or breaks the format.
    """
    fields = read_npz(path, "budget tables")
    try:
        _check_version(fields)
        tables = _from_fields(fields)
        tables.validate()
    except TableFormatError as error:
        raise TableFormatError(f"{path} is not a usable budget table: {error}") from error
    return tables


def _check_version(fields: Mapping[str, Array]) -> None:
    if "format_version" not in fields:
        refuse("format_version", "to be present", f"only {sorted(fields)}")
    version = fields["format_version"]
    if version.ndim != 0 or version.dtype.kind not in "iu" or int(version) != FORMAT_VERSION:
        refuse("format_version", str(FORMAT_VERSION), str(version))


def _from_fields(fields: Mapping[str, Array]) -> BudgetTables:
    required = {*_SCALARS, *REQUIRED_ARRAYS}
    missing, unknown = required - set(fields), set(fields) - required - set(OPTIONAL_ARRAYS)
    if missing:
        refuse("fields", "all required ones", f"none named {', '.join(sorted(missing))}")
    if unknown:
        refuse("fields", "only known ones", f"also {', '.join(sorted(unknown))}")
    arrays: dict[str, Any] = {
        name: _in_dtype(name, fields[name]) for name in ARRAYS if name in fields
    }
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
        refuse(name, "one integer", f"{value.dtype} of shape {value.shape}")
    return int(value)


def _in_dtype(name: str, array: Array) -> Array:
    expected = np.dtype(ARRAYS[name][0])
    if array.dtype != expected:
        refuse(name, f"dtype {expected}", str(array.dtype))
    array.flags.writeable = False
    return array


def _provenance(text: str) -> dict[str, object]:
    try:
        provenance = json.loads(text)
    except json.JSONDecodeError as error:
        refuse("provenance", "JSON", str(error))
    if not isinstance(provenance, dict):
        refuse("provenance", "a JSON object", type(provenance).__name__)
    return provenance
