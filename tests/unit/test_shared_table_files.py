"""Files that are not the shared table they should be, and places that cannot hold one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_factory import make_full_tables

from sglang_alloc import shared_table_layout as layout
from sglang_alloc.budget_tables import save_budget_tables
from sglang_alloc.errors import SharedTableError
from sglang_alloc.shared_table import SelectorWriter, SharedTable, publish_shared_table

NOBODY = 65534


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def content(folder: Path) -> bytes:
    publish_shared_table(folder / "whole.tbl", make_full_tables())
    return (folder / "whole.tbl").read_bytes()


def _refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(SharedTableError) as caught:
        SharedTable.open(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@given(st.floats(0, 0.9999))
def test_a_truncated_file_is_an_error_and_not_a_crash(
    folder: Path, content: bytes, share: float
) -> None:
    size = int(len(content) * share)
    assert f"truncated: {size} bytes" in _refusal(folder / "short.tbl", content[:size])


@pytest.mark.parametrize("size", [0, 1, 7, 8, 12, 4095, 4096, 16383, 16384])
def test_a_file_cut_at_a_boundary_is_truncated(folder: Path, content: bytes, size: int) -> None:
    assert f"truncated: {size} bytes" in _refusal(folder / "short.tbl", content[:size])


@given(st.data())
def test_any_changed_byte_of_header_or_payload_is_found(
    folder: Path, content: bytes, data: st.DataObject
) -> None:
    immutable = st.integers(0, layout.PAGE_BYTES - 1) | st.integers(
        layout.PAYLOAD_OFFSET, len(content) - 1
    )
    position, change = data.draw(immutable), data.draw(st.integers(1, 255))
    damaged = bytearray(content)
    damaged[position] ^= change
    message = _refusal(folder / "damaged.tbl", bytes(damaged))
    if position < 8:
        assert "not a shared table" in message
    elif position < 12:
        assert "has layout version" in message
    else:
        assert "is corrupt" in message


def test_a_file_that_grew_is_corrupt(folder: Path, content: bytes) -> None:
    assert "its header says" in _refusal(folder / "long.tbl", content + b"\0")


def test_a_foreign_file_is_named_by_its_first_bytes(folder: Path) -> None:
    save_budget_tables(folder / "tables.npz", make_full_tables())
    message = _refusal(folder / "foreign.tbl", (folder / "tables.npz").read_bytes())
    assert r"begins with b'PK\x03\x04" in message


def test_another_version_names_both_versions(folder: Path, content: bytes) -> None:
    newer = content[:8] + (7).to_bytes(4, "little") + content[12:]
    message = _refusal(folder / "newer.tbl", newer)
    assert "has layout version 7" in message
    assert "reads version 1" in message


def test_a_header_whose_sections_do_not_fit_the_model_is_corrupt(
    folder: Path, content: bytes
) -> None:
    header = layout.unpack_header(content[: layout.PAGE_BYTES])
    wrong = header._replace(shape=header.shape._replace(num_layers=4))
    message = _refusal(folder / "wrong.tbl", layout.pack_header(wrong) + content[4096:])
    assert "its section quotas is" in message


def test_a_header_without_a_required_section_is_corrupt(folder: Path, content: bytes) -> None:
    header = layout.unpack_header(content[: layout.PAGE_BYTES])
    fewer = header._replace(sections=header.sections[1:])
    message = _refusal(folder / "fewer.tbl", layout.pack_header(fewer) + content[4096:])
    assert "lacks the section quotas" in message


def test_a_section_outside_the_file_is_corrupt(folder: Path, content: bytes) -> None:
    header = layout.unpack_header(content[: layout.PAGE_BYTES])
    outside = header.sections[0]._replace(offset=len(content))
    moved = header._replace(sections=(outside, *header.sections[1:]))
    message = _refusal(folder / "moved.tbl", layout.pack_header(moved) + content[4096:])
    assert "its section quotas is" in message


def test_a_missing_file_says_how_to_make_one(folder: Path) -> None:
    with pytest.raises(SharedTableError, match=r"no shared table at .*sglang-alloc publish"):
        SharedTable.open(folder / "absent.tbl")


@pytest.mark.parametrize("writable", [True, False])
def test_a_folder_is_not_a_table(folder: Path, writable: bool) -> None:
    with pytest.raises(SharedTableError, match=r"Cannot open|is not a file"):
        SharedTable.open(folder, writable=writable)


def test_publishing_below_a_file_says_what_is_wrong(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(SharedTableError, match="Cannot publish a shared table of"):
        publish_shared_table(folder / "file" / "x.tbl", make_full_tables())


@contextmanager
def _as_somebody_else() -> Iterator[None]:
    """Drop root's rights for a while; a user who is not root has none to drop."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def guarded() -> Iterator[Path]:
    """A folder that everyone may enter and nobody but root may write, outside private folders."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        Path(name).chmod(0o755)


def test_publishing_without_write_permission_names_user_and_folder(guarded: Path) -> None:
    guarded.chmod(0o555)
    with _as_somebody_else(), pytest.raises(SharedTableError) as caught:
        publish_shared_table(guarded / "new.tbl", make_full_tables())
    assert "Permission denied (uid" in str(caught.value)
    assert f"folder {guarded}" in str(caught.value)


@pytest.mark.parametrize(("writable", "verb"), [(True, "write to"), (False, "read")])
def test_opening_without_permission_names_what_was_wanted(
    guarded: Path, writable: bool, verb: str
) -> None:
    publish_shared_table(guarded / "mine.tbl", make_full_tables())
    (guarded / "mine.tbl").chmod(0o000)
    guarded.chmod(0o555)
    with _as_somebody_else(), pytest.raises(SharedTableError, match=f"may not {verb} the shared"):
        SharedTable.open(guarded / "mine.tbl", writable=writable)


def test_a_lock_file_of_another_user_is_named(guarded: Path) -> None:
    publish_shared_table(guarded / "mine.tbl", make_full_tables())
    (guarded / "mine.tbl").chmod(0o666)
    guarded.chmod(0o555)
    with (
        _as_somebody_else(),
        SharedTable.open(guarded / "mine.tbl") as table,
        pytest.raises(SharedTableError, match=r"mine\.tbl\.lock .*Permission denied"),
    ):
        SelectorWriter.acquire(table)
