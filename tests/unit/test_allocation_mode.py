"""Whose predicted loss counts, and which mode a published table is for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from table_factory import make_full_tables, make_tables
from typer.testing import CliRunner

from sglang_alloc.allocation_mode import Phase
from sglang_alloc.budget_tables import BudgetTables, save_budget_tables
from sglang_alloc.cli import app
from sglang_alloc.errors import ConfigurationError, TableFormatError
from sglang_alloc.predicted_loss import predicted_loss
from sglang_alloc.shared_table import SharedTable, publish_shared_table

FULL = make_full_tables()
Publish = Callable[[str], SharedTable]


@pytest.fixture
def published(tmp_path: Path) -> Publish:
    def publish(note: str) -> SharedTable:
        publish_shared_table(tmp_path / "t.tbl", FULL, mode_note=note)
        return SharedTable.open(tmp_path / "t.tbl")

    return publish


@pytest.mark.parametrize(
    ("mode", "phase", "section"),
    [
        ("layer", "decode", "predicted_loss"),
        ("layer", "prefill", "prefill_predicted_loss"),
        ("token", "decode", "predicted_loss"),
        ("threshold", "decode", "threshold_predicted_loss"),
        ("threshold", "prefill", "prefill_threshold_loss"),
        ("union", "decode", "union_predicted_loss"),
        ("union", "prefill", "prefill_threshold_loss"),
    ],
)
def test_each_mode_has_its_own_predicted_loss(
    published: Publish, mode: str, phase: Phase, section: str
) -> None:
    table = published(mode)
    np.testing.assert_array_equal(predicted_loss(table, phase), table.section(section))


def test_a_table_for_any_mode_is_as_bad_as_its_worst(published: Publish) -> None:
    np.testing.assert_array_equal(
        predicted_loss(published(""), "decode"), FULL.arrays()["predicted_loss"]
    )


def test_a_table_without_a_mode_s_own_loss_gives_that_of_the_quotas(tmp_path: Path) -> None:
    tables = replace(FULL, threshold_predicted_loss=None, prefill_threshold_loss=None)
    publish_shared_table(tmp_path / "t.tbl", tables, mode_note="threshold")
    with SharedTable.open(tmp_path / "t.tbl") as table:
        np.testing.assert_array_equal(
            predicted_loss(table, "decode"), FULL.arrays()["predicted_loss"]
        )


def test_probes_are_published_but_never_saved(tmp_path: Path) -> None:
    probes = replace(
        make_tables(),
        probes=True,
        budgets=np.arange(1, 3, dtype=np.int32),
        quotas=np.array([[4, 1, 4], [4, 4, 4]], np.int16),
        predicted_loss=np.zeros(2, np.float32),
    )
    publish_shared_table(tmp_path / "t.tbl", probes, mode_note="probe:layer")
    with SharedTable.open(tmp_path / "t.tbl") as table:
        assert (table.shape.budget_min, table.shape.budget_max) == (1, 2)
    with pytest.raises(TableFormatError, match="never saved"):
        save_budget_tables(tmp_path / "t.npz", probes)
    with pytest.raises(TableFormatError, match="probe numbers from 1"):
        replace(probes, budgets=probes.budgets + 1).validate()


@pytest.mark.parametrize(("tables", "best"), [(FULL, "threshold"), (make_tables(), "layer")])
def test_publish_without_a_mode_notes_the_best_as_serve_does(
    tmp_path: Path, tables: BudgetTables, best: str
) -> None:
    npz, path = tmp_path / "t.npz", tmp_path / "t.tbl"
    save_budget_tables(npz, tables)
    arguments = ["publish", str(npz), "--shared-path", str(path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert SharedTable.open(path).mode_note == best


def test_publish_takes_the_mode_that_the_servers_run_in(tmp_path: Path) -> None:
    npz, path = tmp_path / "t.npz", tmp_path / "t.tbl"
    save_budget_tables(npz, FULL)
    arguments = ["publish", str(npz), "--shared-path", str(path), "--mode"]
    assert CliRunner().invoke(app, [*arguments, "union"]).exit_code == 0
    assert SharedTable.open(path).mode_note == "union"
    save_budget_tables(npz, make_tables())
    refused = CliRunner().invoke(app, [*arguments, "union"]).exception
    assert isinstance(refused, ConfigurationError)
    assert "holds no union_quotas or union_thresholds" in str(refused)
    thresholds = np.ones(FULL.quotas.shape, np.float32)
    losses = np.zeros(len(FULL.budgets), np.float32)
    either = make_tables(union_thresholds=thresholds, union_predicted_loss=losses)
    save_budget_tables(npz, either)
    assert CliRunner().invoke(app, [*arguments, "union"]).exit_code == 0
