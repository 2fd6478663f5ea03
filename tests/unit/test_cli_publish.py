"""`sglang-alloc publish`, and where tables go when no path is given."""

import os
from pathlib import Path

import pytest
from table_factory import make_tables, publish_and_open
from typer.testing import CliRunner

from sglang_alloc.budget_tables import save_budget_tables
from sglang_alloc.cli import app
from sglang_alloc.errors import SharedTableError, TableFormatError
from sglang_alloc.shared_table import SharedTable, WorkerCounters
from sglang_alloc.table_path import (
    SHARED_FOLDER,
    default_shared_path,
    find_shared_path,
    require_folder,
)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    save_budget_tables(tmp_path / "tables.npz", make_tables())
    return tmp_path / "tables.npz"


def test_publishing_says_what_was_published_and_where(npz: Path) -> None:
    path = npz.parent / "tiny.tbl"
    result = CliRunner().invoke(app, ["publish", str(npz), "--shared-path", str(path)])
    assert result.exit_code == 0
    assert result.stdout == (
        "Published tiny-moe (3 MoE layers, top-4 of 8 experts, budgets 3 to 12) at " + f"{path}\n"
    )
    with SharedTable.open(path) as table:
        assert table.model_id == "tiny-moe"


def test_publishing_in_a_folder_that_is_not_there_is_refused_and_makes_none(npz: Path) -> None:
    path = npz.parent / "absent" / "tiny.tbl"
    result = CliRunner().invoke(app, ["publish", str(npz), "--shared-path", str(path)])
    assert isinstance(result.exception, SharedTableError)
    assert f"published at {path}, and there is no folder {path.parent}. Make" in str(
        result.exception
    )
    assert not path.parent.exists()


def test_the_default_folder_may_be_missing_because_publishing_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "default" / "tiny.tbl"
    require_folder(path, path.parent)
    publish_and_open(path).close()
    assert path.parent.stat().st_mode & 0o777 == 0o755


def test_publishing_under_a_running_server_warns_that_it_keeps_the_old_table(npz: Path) -> None:
    path = npz.parent / "tiny.tbl"
    with publish_and_open(path) as table:
        table.worker_slot(0).store(WorkerCounters(pid=os.getpid()))
    result = CliRunner().invoke(app, ["publish", str(npz), "--shared-path", str(path)])
    assert result.exit_code == 0
    assert f"pid {os.getpid()} keeps the earlier table" in result.stderr
    again = CliRunner().invoke(app, ["publish", str(npz), "--shared-path", str(path)])
    assert again.stderr == ""


def test_publishing_a_damaged_file_changes_nothing(npz: Path) -> None:
    path = npz.parent / "tiny.tbl"
    before = publish_and_open(path).publication_id
    npz.write_bytes(npz.read_bytes()[:100])
    result = CliRunner().invoke(app, ["publish", str(npz), "--shared-path", str(path)])
    assert isinstance(result.exception, TableFormatError)
    assert SharedTable.open(path).publication_id == before


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("Qwen/Qwen3-30B-A3B", "Qwen-Qwen3-30B-A3B.tbl"),
        ("/models/tiny moe", "models-tiny-moe.tbl"),
        ("../../etc/passwd", "etc-passwd.tbl"),
        ("模型", "model.tbl"),
    ],
)
def test_a_model_s_default_path_is_a_plain_name_in_the_shared_folder(
    model_id: str, name: str
) -> None:
    assert default_shared_path(model_id) == SHARED_FOLDER / name


def test_a_path_that_was_asked_for_comes_first(tmp_path: Path) -> None:
    environment = {"SGLANG_ALLOC_TABLE": "/from/environment.tbl"}
    asked = Path("/asked/for.tbl")
    assert find_shared_path(asked, environment, tmp_path) == asked
    assert find_shared_path(None, environment, tmp_path) == Path("/from/environment.tbl")


def test_the_only_table_of_the_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "one.tbl").touch()
    (tmp_path / "one.tbl.lock").touch()
    assert find_shared_path(None, {}, tmp_path) == tmp_path / "one.tbl"


@pytest.mark.parametrize(("names", "listed"), [([], "none"), (["a", "b"], r"a\.tbl.*b\.tbl")])
def test_no_table_or_several_have_to_be_named(
    tmp_path: Path, names: list[str], listed: str
) -> None:
    for name in names:
        (tmp_path / f"{name}.tbl").touch()
    with pytest.raises(SharedTableError, match=rf"holds {len(names)} .*{listed}"):
        find_shared_path(None, {}, tmp_path)
