"""Several real processes on one shared table at full speed."""

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import table_processes
from table_factory import publish_and_open

from sglang_alloc.errors import TableInUseError
from sglang_alloc.shared_table import SelectorWriter, SharedTable

SPAWN = multiprocessing.get_context("spawn")
READERS = 3
OVERRIDES = 500


class Processes:
    """Processes that end with the test at the latest."""

    def __init__(self) -> None:
        self.started: list[BaseProcess] = []

    def start(self, target: Callable[..., None], *arguments: Any) -> BaseProcess:
        process = SPAWN.Process(target=target, args=arguments, daemon=True)
        process.start()
        self.started.append(process)
        return process

    def start_reporting(
        self, target: Callable[..., None], path: Path, *arguments: Any
    ) -> Connection:
        receiver, sender = SPAWN.Pipe(duplex=False)
        self.start(target, path, sender, *arguments)
        sender.close()
        return receiver


@pytest.fixture
def processes() -> Iterator[Processes]:
    owned = Processes()
    yield owned
    for process in owned.started:
        process.kill()
        process.join()


@pytest.fixture
def table(tmp_path: Path) -> SharedTable:
    return publish_and_open(tmp_path / "tiny.tbl", num_layers=8, top_k=6)


def test_readers_see_no_torn_row_no_step_back_and_the_last_generation(
    table: SharedTable, processes: Processes
) -> None:
    enough, written = SPAWN.Event(), SPAWN.Event()
    readers = [
        processes.start_reporting(table_processes.read_until, table.path, written)
        for _ in range(READERS)
    ]
    assert [reader.recv() for reader in readers] == ["reading"] * READERS
    writer = processes.start_reporting(table_processes.write_until, table.path, enough)
    assert [reader.recv() for reader in readers] == ["seen many"] * READERS
    enough.set()
    last = writer.recv()
    written.set()
    assert [reader.recv() for reader in readers] == [last] * READERS
    assert table.selector() == (last, *table_processes.budgets_of(last, table))


def test_a_writer_killed_in_mid_hammer_leaves_a_table_that_the_next_one_continues(
    table: SharedTable, processes: Processes
) -> None:
    for _ in range(5):
        goal = table.selector().generation + 1000
        writer = processes.start(table_processes.write_for_ever, table.path)
        table_processes.wait_for_generation(table, goal)
        with pytest.raises(TableInUseError, match=f"pid {writer.pid} already does"):
            SelectorWriter.acquire(table)
        writer.kill()
        writer.join()
        left = SharedTable.open(table.path, writable=False).selector()
        assert left[1:] == table_processes.budgets_of(left.generation, table)
        with SelectorWriter.acquire(table) as successor:
            assert table.selector() == left
            following = left.generation + 1
            budgets = table_processes.budgets_of(following, table)
            assert successor.write(*budgets) == following


def test_overrides_of_two_setters_are_seen_whole_or_not_at_all(
    table: SharedTable, processes: Processes
) -> None:
    setters = [
        processes.start(table_processes.override_for_ever, table.path, seed) for seed in (1, 2)
    ]
    reports = [
        processes.start_reporting(table_processes.read_overrides, table.path, OVERRIDES)
        for _ in range(2)
    ]
    assert [report.recv() for report in reports] == [OVERRIDES] * 2
    for setter in setters:
        setter.kill()
        setter.join()
    table.set_override(9, 10, 2**62, "after the kill")
    override = table.override(2**62 - 1)
    assert override is not None
    assert (override.prefill_budget, override.decode_budget) == (9, 10)
    assert override.actor == "after the kill"
