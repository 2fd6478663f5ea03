"""The journal of a profile: what was measured survives, and belongs to one model and text."""

import errno
import os
from pathlib import Path

import pytest

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.profile_journal import Entry, ProfileJournal

IDENTITY = {"model_id": "tiny", "windows": 4, "measured": (1.0, 2.0)}
FIRST = Entry("layer:decode", 0, 0, (1.5, 2.5), 100)
SECOND = Entry("layer:decode", 1, 0, (0.1 + 0.2, 1e-17), 50)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = tmp_path / "work" / "journal.jsonl"
    opened = ProfileJournal(journal, IDENTITY)
    opened.add(FIRST)
    opened.pin("windows_sha256", "ab")
    opened.add(SECOND)
    return journal


def test_what_was_measured_is_found_again_bit_for_bit(path: Path) -> None:
    journal = ProfileJournal(path, IDENTITY)
    assert journal.find("layer:decode", 0, 0) == FIRST
    assert journal.find("layer:decode", 1, 0) == SECOND
    assert journal.find("layer:decode", 2, 0) is None
    assert journal.pinned("windows_sha256") == "ab"


@pytest.mark.parametrize("lost_bytes", range(1, 60, 7))
def test_a_last_line_that_was_cut_off_is_dropped_and_written_again(
    path: Path, lost_bytes: int
) -> None:
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    journal = ProfileJournal(path, IDENTITY)
    assert journal.find("layer:decode", 0, 0) == FIRST
    assert journal.find("layer:decode", 1, 0) is None
    journal.add(SECOND)
    assert ProfileJournal(path, IDENTITY).find("layer:decode", 1, 0) == SECOND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_id": "other"}, "model_id was 'tiny' and is now 'other'"),
        ({"windows": 8}, "windows was 4 and is now 8"),
        ({"text_sha256": "cd"}, "text_sha256 was None and is now 'cd'"),
    ],
)
def test_a_profile_of_something_else_is_refused_by_name(
    path: Path, change: dict[str, object], message: str
) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=message):
        ProfileJournal(path, {**IDENTITY, **change})
    assert path.read_bytes() == before


def test_a_run_that_measured_nothing_gives_its_place_to_another(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    ProfileJournal(path, IDENTITY)
    other = {**IDENTITY, "windows": 8}
    ProfileJournal(path, other).add(FIRST)
    assert ProfileJournal(path, other).find("layer:decode", 0, 0) == FIRST
    with pytest.raises(ConfigurationError, match="windows was 8 and is now 4"):
        ProfileJournal(path, IDENTITY)


def test_a_single_line_of_another_format_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text('{"format": "mine"}\n')
    with pytest.raises(ConfigurationError, match="format was 'mine'"):
        ProfileJournal(path, IDENTITY)
    assert path.read_text() == '{"format": "mine"}\n'


def test_other_windows_of_the_same_text_are_refused(path: Path) -> None:
    journal = ProfileJournal(path, IDENTITY)
    with pytest.raises(ConfigurationError, match="windows_sha256 was 'ab' and is now 'cd'"):
        journal.pin("windows_sha256", "cd")


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("dear diary\nsecond line\n")
    with pytest.raises(ConfigurationError, match="not a journal"):
        ProfileJournal(tmp_path / "notes", IDENTITY)
    assert (tmp_path / "notes").read_text() == "dear diary\nsecond line\n"


def test_a_full_disk_says_how_to_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal = ProfileJournal(path, IDENTITY)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match=r"No space left.*same command again"):
        journal.add(Entry("layer:decode", 2, 0, (1.0,), 1))


def test_a_loss_that_is_not_a_number_is_never_written(path: Path) -> None:
    journal = ProfileJournal(path, IDENTITY)
    with pytest.raises(ValueError, match="not JSON"):
        journal.add(Entry("layer:decode", 2, 0, (float("nan"),), 1))
    assert len(ProfileJournal(path, IDENTITY).entries) == 2


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"journal\.jsonl.* cannot be written"):
        ProfileJournal(tmp_path / "file" / "journal.jsonl", IDENTITY)
