"""What is no .npz file is refused in words that say what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.errors import TableFormatError
from sglang_alloc.npz_file import read_npz, write_npz
from sglang_alloc.sensitivity_file import load_sensitivities


def test_what_was_written_is_read(tmp_path: Path) -> None:
    fields = {"a": np.arange(3), "b": np.str_("text")}
    write_npz(tmp_path / "new" / "f.npz", fields, "numbers")
    found = read_npz(tmp_path / "new" / "f.npz", "numbers")
    assert found.keys() == fields.keys()
    np.testing.assert_array_equal(found["a"], fields["a"])
    assert str(found["b"]) == "text"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f.npz"]


@pytest.mark.parametrize("load", [load_budget_tables, load_sensitivities])
def test_a_single_array_is_told_from_named_ones(tmp_path: Path, load: object) -> None:
    assert callable(load)
    np.save(tmp_path / "quotas.npy", np.ones((3, 4)))
    with pytest.raises(TableFormatError, match=r"not an intact .*it is one array, of numpy\.save"):
        load(tmp_path / "quotas.npy")


@pytest.mark.parametrize("content", [b"layer,k,loss\n1,2,0.1\n", b"", b"\x80\x04."])
def test_a_file_of_another_kind_is_no_zip_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.npz").write_bytes(content)
    with pytest.raises(TableFormatError, match=r"of numbers \(it is no zip file\)"):
        read_npz(tmp_path / "f.npz", "numbers")
