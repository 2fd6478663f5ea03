"""The controller's log lines: whole where they can be written, dropped where not."""

import os
from pathlib import Path

from sglang_alloc_controller.log_output import LogOutput


def test_a_line_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        LogOutput(file.fileno()).info("one \udc80 line")
    assert path.read_bytes() == b"one ? line\n"


def test_a_full_disk_raises_nothing() -> None:
    with open("/dev/full", "wb", buffering=0) as file:
        LogOutput(file.fileno()).warning("lost")


def test_a_reader_that_has_gone_away_raises_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    LogOutput(writer).error("lost")
    os.close(writer)


def test_a_reader_that_does_not_read_costs_lines_and_holds_up_nothing() -> None:
    reader, writer = os.pipe()
    output = LogOutput(writer)
    written = 0
    while not output.lost_lines:
        output.info(f"line {written}")
        written += 1
    for _ in range(9):
        output.info("lost")
    assert output.lost_lines == 10
    os.read(reader, 1 << 20)
    output.info("read again")
    assert os.read(reader, 1 << 20) == b"read again\n"
    os.close(reader)
    os.close(writer)


def test_a_line_that_was_cut_short_is_ended_before_the_next_one() -> None:
    reader, writer = os.pipe()
    output = LogOutput(writer)
    output.info("long" * 100_000)
    assert output.lost_lines == 1
    os.read(reader, 1 << 20)
    output.info("next")
    assert os.read(reader, 1 << 20) == b"\nnext\n"
    os.close(reader)
    os.close(writer)
