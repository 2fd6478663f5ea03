"""What the processes of the hammering tests do; each returns or reports plain numbers."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

from waiting import PATIENCE_SECONDS, wait_until

from sglang_alloc.shared_table import Selector, SelectorWriter, SharedTable, is_newer_generation

MANY = 1000


def budgets_of(generation: int, table: SharedTable) -> tuple[int, int]:
    """Both budgets follow from the generation, so that any mixture of two words shows."""
    step = generation % table.shape.num_budgets
    return table.shape.budget_min + step, table.shape.budget_max - step


def write_until(path: Path, report: Connection, enough: Event) -> None:
    """Write generations as fast as possible until `enough`, then report the last one."""
    report.send(_write_while(path, lambda: not enough.is_set()))


def write_for_ever(path: Path) -> None:
    """Write generations as fast as possible, holding nothing that a kill could leave locked."""
    _write_while(path, lambda: True)


def _write_while(path: Path, condition: Callable[[], bool]) -> int:
    with SharedTable.open(path) as table, SelectorWriter.acquire(table) as writer:
        generation = table.selector().generation
        while condition():
            generation += 1
            assert writer.write(*budgets_of(generation, table)) == generation
            writer.beat(generation)
    return generation


def read_until(path: Path, report: Connection, written: Event) -> None:
    """Check every word and its rows; report having seen many, and what came last."""
    with SharedTable.open(path, writable=False) as table:
        distinct, newest = 0, 1
        report.send("reading")
        last_pass = False
        while not last_pass:
            last_pass = written.is_set()
            selector = table.selector()
            if selector.generation == newest:
                continue
            assert is_newer_generation(selector.generation, newest)
            _check_rows(table, selector)
            newest, distinct = selector.generation, distinct + 1
            if distinct == MANY:
                report.send("seen many")
    report.send(newest)


def _check_rows(table: SharedTable, selector: Selector) -> None:
    budgets = selector[1:]
    assert budgets == budgets_of(selector.generation, table)
    quotas = table.section("quotas")
    rows = [quotas[budget - table.shape.budget_min] for budget in budgets]
    assert tuple(row.sum() for row in rows) == budgets


def override_for_ever(path: Path, seed: int) -> None:
    """Set and clear overrides until killed; the actor repeats what the words say."""
    with SharedTable.open(path) as table:
        low, count = table.shape.budget_min, table.shape.num_budgets
        for step in range(seed, 2**31, 7):
            budgets = low + step % count, low + step // count % count
            deadline_ns = time.monotonic_ns() + 10**9 + step
            table.set_override(*budgets, deadline_ns, f"{budgets} {deadline_ns}")
            if step % 5 == 0:
                table.clear_override()


def read_overrides(path: Path, report: Connection, wanted: int) -> None:
    """Read until `wanted` different overrides were seen whole; report how many there were."""
    with SharedTable.open(path, writable=False) as table:
        seen = 0
        last: object = None
        give_up = time.monotonic() + PATIENCE_SECONDS
        while seen < wanted and time.monotonic() < give_up:
            override = table.override(time.monotonic_ns())
            if override is None or override == last:
                continue
            budgets = (override.prefill_budget, override.decode_budget)
            assert override.actor == f"{budgets} {override.deadline_ns}"
            last, seen = override, seen + 1
    report.send(seen)


def wait_for_generation(table: SharedTable, generation: int) -> None:
    """Wait until another process has written `generation`."""
    wait_until(lambda: table.selector().generation >= generation, f"generation {generation}")
