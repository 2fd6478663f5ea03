"""One writer at a time, and a new one carries on where the last one stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from table_factory import publish_and_open

from sglang_alloc.errors import SharedTableError, TableInUseError
from sglang_alloc.shared_table import Selector, SelectorWriter, SharedTable, lock_path

HOLD_THE_RIGHT = """
import sys, time
from pathlib import Path
from sglang_alloc.shared_table import SelectorWriter, SharedTable
writer = SelectorWriter.acquire(SharedTable.open(Path(sys.argv[1])))
writer.write(5, 7)
print("holding", flush=True)
time.sleep(600)
"""


def _start_holder(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD_THE_RIGHT, str(path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holding\n"
    return holder


def test_each_change_is_one_generation(table: SharedTable) -> None:
    writer = SelectorWriter.acquire(table)
    assert [writer.write(5, 7), writer.write(5, 7), writer.write(12, 3)] == [2, 3, 4]
    assert table.selector() == Selector(4, 12, 3)


def test_a_beat_is_seen_as_given(table: SharedTable) -> None:
    SelectorWriter.acquire(table).beat(123_456)
    assert table.heartbeat_ns() == 123_456


@pytest.mark.parametrize(("prefill_budget", "decode_budget"), [(2, 5), (5, 13), (-1, 5)])
def test_a_budget_without_a_row_is_not_written(
    table: SharedTable, prefill_budget: int, decode_budget: int
) -> None:
    writer = SelectorWriter.acquire(table)
    with pytest.raises(SharedTableError, match="has rows for 3 to 12"):
        writer.write(prefill_budget, decode_budget)
    assert table.selector() == Selector(1, 12, 12)


def test_generations_wrap_past_zero(table: SharedTable) -> None:
    with table.path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(((2**32 - 1) << 32 | 5 << 16 | 7).to_bytes(8, "little"))
    assert SelectorWriter.acquire(table).write(6, 6) == 1


def test_a_second_writer_is_refused_with_the_pid_of_the_first(table: SharedTable) -> None:
    holder = _start_holder(table.path)
    try:
        with pytest.raises(TableInUseError, match=f"pid {holder.pid} already does"):
            SelectorWriter.acquire(table)
        assert table.writer_pid() == holder.pid
        assert lock_path(table.path).read_text() == f"{holder.pid} 1\n"
    finally:
        holder.kill()
        holder.communicate()


def test_after_a_killed_writer_the_next_continues_without_a_jump(table: SharedTable) -> None:
    holder = _start_holder(table.path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    writer = SelectorWriter.acquire(table)
    assert table.selector() == Selector(2, 5, 7)
    assert (table.writer_epoch(), table.writer_pid()) == (2, os.getpid())
    assert lock_path(table.path).read_text() == f"{os.getpid()} 2\n"
    assert writer.write(6, 7) == 3


def test_a_closed_writer_makes_room_for_the_next(table: SharedTable) -> None:
    with SelectorWriter.acquire(table) as first:
        first.write(5, 7)
    first.close()
    assert SelectorWriter.acquire(table).write(6, 7) == 3


def test_the_right_covers_later_publications_at_the_same_path(table: SharedTable) -> None:
    SelectorWriter.acquire(table)
    replacement = publish_and_open(table.path)
    with pytest.raises(TableInUseError, match="one table has one writer"):
        SelectorWriter.acquire(replacement)


def test_a_writer_whose_lock_file_was_removed_is_fenced_off(table: SharedTable) -> None:
    first = SelectorWriter.acquire(table)
    lock_path(table.path).unlink()
    second = SelectorWriter.acquire(table)
    second.write(5, 7)
    for action in (lambda: first.write(9, 9), lambda: first.beat(1)):
        with pytest.raises(TableInUseError, match=r"writer 2 .* has taken over"):
            action()
    assert table.selector() == Selector(2, 5, 7)


def test_a_lock_file_that_cannot_be_made_is_named(table: SharedTable) -> None:
    lock_path(table.path).mkdir()
    with pytest.raises(SharedTableError, match=r"Cannot open the lock file .*tiny\.tbl\.lock"):
        SelectorWriter.acquire(table)
