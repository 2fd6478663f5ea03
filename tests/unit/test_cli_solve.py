"""`sglang-alloc solve`: from a matrix on disk to tables, a text and a picture."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.cli import app
from sglang_alloc.errors import AllocError, ConfigurationError, TableFormatError
from sglang_alloc.sensitivity_file import (
    ProfiledModel,
    Sensitivities,
    load_sensitivities,
    save_sensitivities,
)
from sglang_alloc.solve import solve_all_budgets

MATRIX = np.random.default_rng(0).random((3, 4)).cumsum(axis=1)[:, ::-1] - 0.2
MODEL = ProfiledModel("tiny-moe", "ab" * 32, 8, (1, 2, 5))


def _solve(folder: Path, *options: str) -> Result:
    arguments = ["solve", str(folder / "s.npz"), "-o", str(folder / "t.npz"), *options]
    return CliRunner().invoke(app, arguments)


def _refusal(folder: Path, *options: str) -> AllocError:
    error = _solve(folder, *options).exception
    assert isinstance(error, AllocError)
    assert not (folder / "t.npz").exists()
    return error


def test_a_bare_matrix_gives_budgets_quotas_and_losses(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", sensitivity=MATRIX)
    result = _solve(tmp_path)
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "t.npz") as tables:
        expected = solve_all_budgets(MATRIX)
        np.testing.assert_array_equal(tables["budgets"], np.arange(3, 13))
        np.testing.assert_array_equal(tables["quotas"], expected.quotas)
        np.testing.assert_array_equal(tables["predicted_loss"], expected.predicted_loss)
        assert "solved_by" in str(tables["provenance"])
    assert "    12     12 " in result.stdout


def test_a_profiled_model_gives_tables_that_can_be_published(tmp_path: Path) -> None:
    measured = Sensitivities(
        MATRIX,
        prefill_sensitivity=MATRIX[::-1] / 2,
        union_sensitivity=MATRIX / 4,
        saliency=np.ones((3, 8)),
        model=MODEL,
        provenance={"seed": 3},
    )
    save_sensitivities(tmp_path / "s.npz", measured)
    assert _solve(tmp_path, "--pin", "5=2").exit_code == 0
    tables = load_budget_tables(tmp_path / "t.npz")
    assert (tables.model_id, tables.layer_ids.tolist()) == ("tiny-moe", [1, 2, 5])
    assert (tables.quotas[:-1, 2] == 2).all()
    assert tables.provenance["max_quotas"] == [4, 4, 2]
    assert tables.provenance["seed"] == 3
    assert tables.prefill_quotas is not None
    assert tables.union_predicted_loss is not None
    np.testing.assert_allclose(tables.union_predicted_loss, tables.predicted_loss / 4, rtol=1e-6)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", sensitivity=MATRIX)
    assert _solve(tmp_path, "--plot", str(tmp_path / "p.png")).exit_code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["p.xyz", "p.npz"])
def test_a_picture_of_no_known_kind_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    np.savez(tmp_path / "s.npz", sensitivity=MATRIX)
    error = _refusal(tmp_path, "--plot", str(tmp_path / name))
    assert isinstance(error, ConfigurationError)
    assert f"{name} was asked for" in str(error)
    assert ".png, .svg, .pdf" in str(error)


def test_infeasible_bounds_write_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", sensitivity=MATRIX)
    error = _refusal(tmp_path, "--min-quota", "1=3", "--max-quota", "2")
    assert isinstance(error, ConfigurationError)
    assert "Layer 1 is to keep at least 3" in str(error)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sensitivity": np.array([[1.0, np.nan]])}, "found nan for layer 0, column 1"),
        ({"sensitivity": np.array([[np.inf, 1.0]])}, "found inf for layer 0, column 0"),
        ({"sensitivity": np.ones(3)}, "expected a matrix"),
        ({"sensitivity": np.array([["a"]])}, "expected numbers, found <U1"),
        ({"S": np.ones((2, 2))}, "no array `sensitivity`.*only S"),
        ({"sensitivity": np.ones((2, 2)), "fingerprint": "ab"}, "no layer_ids, model_id, num"),
        (
            {"sensitivity": np.ones((2, 2)), "prefill_sensitivity": np.ones((2, 3))},
            r"prefill_sensitivity: expected shape \(2, 2\)",
        ),
        (
            {"sensitivity": np.ones((2, 2)), "threshold_sensitivity": np.ones((2, 2))},
            r"threshold_sensitivity: expected shape \(2, 3\)",
        ),
    ],
)
def test_what_cannot_be_solved_is_named(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "s.npz", **fields)
    with pytest.raises(TableFormatError, match=message):
        raise _refusal(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", sensitivity=MATRIX)
    (tmp_path / "s.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-40])
    assert "not an intact" in str(_refusal(tmp_path))


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "s.npz", sensitivity=MATRIX)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in str(_refusal(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_saved_sensitivities_are_loaded_unchanged(tmp_path: Path) -> None:
    measured = Sensitivities(
        MATRIX, threshold_sensitivity=np.ones((3, 7)), model=MODEL, provenance={"tokens": 5}
    )
    save_sensitivities(tmp_path / "s.npz", measured)
    loaded = load_sensitivities(tmp_path / "s.npz")
    assert (loaded.model, loaded.provenance) == (MODEL, {"tokens": 5})
    assert loaded.matrices().keys() == {"sensitivity", "threshold_sensitivity"}
    np.testing.assert_array_equal(loaded.sensitivity, MATRIX)
