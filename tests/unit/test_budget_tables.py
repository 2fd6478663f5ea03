"""Budget tables: what is saved is loaded, and what breaks the format is refused by name."""

import itertools
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_factory import make_full_tables, make_tables

from sglang_alloc.budget_tables import BudgetTables, load_budget_tables, save_budget_tables
from sglang_alloc.errors import TableFormatError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def _assert_same(left: BudgetTables, right: BudgetTables) -> None:
    scalars = ("model_id", "fingerprint", "num_experts", "top_k", "provenance")
    assert all(getattr(left, name) == getattr(right, name) for name in scalars)
    arrays = left.arrays()
    assert arrays.keys() == right.arrays().keys()
    for name, array in right.arrays().items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_saved_tables_are_loaded_unchanged(
    folder: Path, num_layers: int, top_k: int, more_experts: int, full: bool
) -> None:
    make = make_full_tables if full else make_tables
    tables = make(num_layers, top_k, top_k + more_experts)
    save_budget_tables(folder / "same.npz", tables)
    _assert_same(load_budget_tables(folder / "same.npz"), tables)


@given(st.data())
def test_a_damaged_byte_is_refused_or_harmless(folder: Path, data: st.DataObject) -> None:
    tables = make_full_tables()
    save_budget_tables(folder / "whole.npz", tables)
    content = bytearray((folder / "whole.npz").read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    (folder / "damaged.npz").write_bytes(content)
    try:
        loaded = load_budget_tables(folder / "damaged.npz")
    except TableFormatError:
        return
    _assert_same(loaded, tables)


@pytest.mark.parametrize("field", [30, 32], ids=["length of extra field", "length of comment"])
def test_an_entry_that_swallows_those_behind_it_is_refused(folder: Path, field: int) -> None:
    tables = make_full_tables()
    save_budget_tables(folder / "whole.npz", tables)
    content = (folder / "whole.npz").read_bytes()
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    for entry, behind in itertools.pairwise(entries):
        damaged = bytearray(content)
        (length,) = struct.unpack_from("<H", content, entry + field)
        # Just so much that the entry behind is a part of this one.
        struct.pack_into("<H", damaged, entry + field, length + _entry_bytes(content, behind))
        (folder / "damaged.npz").write_bytes(damaged)
        with pytest.raises(TableFormatError, match="not an intact"):
            load_budget_tables(folder / "damaged.npz")


def _entry_bytes(content: bytes, entry: int) -> int:
    return 46 + sum(struct.unpack_from("<HHH", content, entry + 28))


def test_a_member_that_a_flipped_bit_marks_as_encrypted_is_refused(folder: Path) -> None:
    save_budget_tables(folder / "whole.npz", make_tables())
    content = bytearray((folder / "whole.npz").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (folder / "encrypted.npz").write_bytes(content)
    with pytest.raises(TableFormatError, match="not an intact"):
        load_budget_tables(folder / "encrypted.npz")


@given(st.floats(0, 0.999))
def test_a_truncated_file_is_refused(folder: Path, share: float) -> None:
    save_budget_tables(folder / "whole.npz", make_full_tables())
    content = (folder / "whole.npz").read_bytes()
    (folder / "short.npz").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TableFormatError, match=r"short\.npz"):
        load_budget_tables(folder / "short.npz")


def test_a_missing_file_says_where_it_was_looked_for(folder: Path) -> None:
    with pytest.raises(TableFormatError, match=r"no budget tables at .*absent\.npz"):
        load_budget_tables(folder / "absent.npz")


def test_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(TableFormatError, match="Cannot read"):
        load_budget_tables(folder)


def test_a_file_without_a_folder_to_go_to_says_so(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(TableFormatError, match="Cannot write budget tables"):
        save_budget_tables(folder / "file" / "tables.npz", make_tables())


def _write_fields(path: Path, **changes: Any) -> Path:
    save_budget_tables(path, make_tables())
    with np.load(path) as archive:
        fields = {name: archive[name] for name in archive.files} | changes
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": np.int64(2)}, "format_version: expected 1, found 2"),
        ({"format_version": None}, "format_version: expected to be present"),
        ({"quotas": None}, "none named quotas"),
        ({"threshold": np.ones(3)}, "also threshold"),
        ({"top_k": np.float64(4)}, "top_k: expected one integer, found float64"),
        ({"budgets": np.arange(3.0)}, "budgets: expected dtype int32, found float64"),
        ({"provenance": np.str_("{")}, "provenance: expected JSON"),
        ({"provenance": np.str_("[]")}, "provenance: expected a JSON object, found list"),
        ({"quotas": np.array([{}], dtype=object)}, "not an intact"),
    ],
)
def test_a_file_of_other_fields_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = _write_fields(tmp_path / "odd.npz", **changes)
    with pytest.raises(TableFormatError, match=message):
        load_budget_tables(path)


def _with(array: np.ndarray, index: Any, value: float) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


PLAIN = make_full_tables()
BROKEN = {
    "model_id: expected 1 to 255 bytes": {"model_id": ""},
    "fingerprint: expected 64": {"fingerprint": "xyz"},
    r"top_k: expected 1 to num_experts \(3\)": {"num_experts": 3},
    "layer_ids: expected one dimension": {"layer_ids": np.zeros((3, 1), np.int32)},
    "layer_ids: expected ascending": {"layer_ids": np.array([1, 1, 2], np.int32)},
    r"quotas: expected shape \(10, 3\)": {"quotas": PLAIN.quotas[:, :2]},
    r"budgets: expected every integer .* 3 .* to 12": {"budgets": PLAIN.budgets + 1},
    "quotas: expected 1 to 4, found 0": {"quotas": _with(PLAIN.quotas, (2, 0), 0)},
    "quotas: expected a sum of at most 3 in row 0": {"quotas": np.full_like(PLAIN.quotas, 4)},
    "prefill_quotas: expected 4 in every layer of the last": {
        "prefill_quotas": _with(PLAIN.quotas, (-1, 0), 3)
    },
    "prefill_quotas: expected prefill_predicted_loss beside": {"prefill_predicted_loss": None},
    "union_predicted_loss: expected union_quotas or union_thresholds beside": {
        "union_quotas": None,
        "union_thresholds": None,
    },
    "union_thresholds: expected union_predicted_loss beside": {
        "union_quotas": None,
        "union_predicted_loss": None,
    },
    "union_references: expected 1 to 4, found 0": {
        "union_references": _with(PLAIN.quotas, (0, 0), 0)
    },
    "threshold_predicted_loss: expected thresholds beside": {"thresholds": None},
    "union_quotas: expected a sum of at most 3": {"union_quotas": np.full_like(PLAIN.quotas, 4)},
    r"threshold_quotas: expected a sum of at most 3 in row 0, found 3.75": {
        "threshold_quotas": np.full(PLAIN.quotas.shape, 1.25, np.float32)
    },
    "predicted_loss: expected finite": {"predicted_loss": _with(PLAIN.predicted_loss, 0, np.nan)},
    "references: expected 1 to 4, found 0": {"references": _with(PLAIN.quotas, (0, 0), 0)},
    "saliency: expected finite": {"saliency": _with(PLAIN.saliency, (0, 0), np.inf)},
}


@pytest.mark.parametrize(("message", "change"), BROKEN.items())
def test_a_broken_promise_names_the_field(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(TableFormatError, match=message):
        replace(PLAIN, **change).validate()


def test_loaded_arrays_cannot_be_changed(tmp_path: Path) -> None:
    save_budget_tables(tmp_path / "tables.npz", make_tables())
    with pytest.raises(ValueError, match="read-only"):
        load_budget_tables(tmp_path / "tables.npz").quotas[0, 0] = 1
