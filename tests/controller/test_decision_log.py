"""The decision log: whole lines, rotation, and a full disk that stops nothing."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.decision_log import DecisionLog
from sglang_alloc_controller.settings import DecisionLogSettings


def _log(path: Path, lost: list[int] | None = None, **settings: int) -> DecisionLog:
    count = lost if lost is not None else []
    return DecisionLog(DecisionLogSettings(path=str(path), **settings), lambda: count.append(1))


def _numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_lines_are_appended_to_an_earlier_log(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    for start in (0, 2):
        log = _log(path)
        log.write({"n": start})
        log.write({"n": start + 1})
        log.close()
    assert _numbers(path) == [0, 1, 2, 3]


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    DecisionLog(DecisionLogSettings(), lambda: None).write({"n": 1})
    assert list(tmp_path.iterdir()) == []


def test_the_log_rotates_and_keeps_so_many_files(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    log = _log(path, max_bytes=4096, keep_files=2)
    for number in range(400):
        log.write({"n": number, "padding": "x" * 50})
    files = sorted(one.name for one in tmp_path.iterdir())
    assert files == ["d.jsonl", "d.jsonl.1", "d.jsonl.2"]
    kept = [n for name in reversed(files) for n in _numbers(tmp_path / name)]
    assert kept == list(range(kept[0], 400))
    assert all(one.stat().st_size <= 4096 for one in tmp_path.iterdir())


def test_rotation_without_kept_files_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    log = _log(path, max_bytes=4096, keep_files=0)
    for number in range(400):
        log.write({"n": number, "padding": "x" * 50})
    assert [one.name for one in tmp_path.iterdir()] == ["d.jsonl"]
    assert _numbers(path)[-1] == 399


def test_a_full_disk_costs_lines_and_is_over_when_there_is_room(tmp_path: Path) -> None:
    # A file size limit stands in for a full disk: the kernel refuses to write beyond it.
    path, lost = tmp_path / "d.jsonl", []
    log = _log(path, lost)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (110, before[1]))
        for number in range(10):
            log.write({"n": number, "padding": "x" * 30})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    log.write({"n": 10})
    assert len(lost) == 8
    assert _numbers(path) == [0, 1, 10]


def test_a_number_that_json_does_not_have_costs_its_line_only(tmp_path: Path) -> None:
    path, lost = tmp_path / "d.jsonl", []
    log = _log(path, lost)
    for number in (1, float("nan"), 3):
        log.write({"n": number})
    assert _numbers(path) == [1, 3]
    assert len(lost) == 1


def test_a_folder_that_vanished_costs_lines_only(tmp_path: Path) -> None:
    folder, lost = tmp_path / "logs", []
    folder.mkdir()
    log = _log(folder / "d.jsonl", lost, max_bytes=4096)
    for one in folder.iterdir():
        one.unlink()
    folder.rmdir()
    for number in range(200):
        log.write({"n": number, "padding": "x" * 50})
    assert lost


def test_a_log_that_somebody_moved_or_deleted_begins_anew(tmp_path: Path) -> None:
    """As an outside log rotation does, which must not lose what replay stands on."""
    path, lost = tmp_path / "d.jsonl", []
    log = _log(path, lost)
    log.begin({"n": 0})
    log.write({"n": 1})
    path.rename(tmp_path / "moved")
    log.write({"n": 2})
    path.unlink()
    log.write({"n": 3})
    assert _numbers(tmp_path / "moved") == [0, 1]
    assert _numbers(path) == [0, 3]
    assert json.loads(path.read_text().splitlines()[0])["continued"]
    assert lost == []


def test_a_line_that_another_life_left_unfinished_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"n": 0}\n{"n"')
    _log(path).write({"n": 1})
    assert path.read_text() == '{"n": 0}\n{"n"\n{"n":1}\n'


def test_a_pipe_that_nobody_reads_costs_lines_and_does_not_block(tmp_path: Path) -> None:
    pipe, lost = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(ConfigurationError, match=r"decision_log\.path is .*pipe"):
        _log(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = _log(pipe, lost)
    log.begin({"n": 0})
    for number in range(1, 100):
        log.write({"n": number, "padding": "x" * 3000})
    assert lost
    assert [json.loads(line)["n"] for line in os.read(reader, 4000).splitlines()[:2]] == [0, 1]
    os.close(reader)


def test_a_log_behind_a_symbolic_link_rotates_where_it_is(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "d.jsonl", tmp_path / "d.jsonl"
    real.parent.mkdir()
    real.touch()
    link.symlink_to(real)
    log = _log(link, max_bytes=4096, keep_files=1)
    for number in range(400):
        log.write({"n": number, "padding": "x" * 50})
    assert link.is_symlink()
    assert _numbers(link)[-1] == 399
    assert sorted(one.name for one in real.parent.iterdir()) == ["d.jsonl", "d.jsonl.1"]


def test_a_path_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"decision_log\.path is .*No such file"):
        _log(tmp_path / "none" / "d.jsonl")
