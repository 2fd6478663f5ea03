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
