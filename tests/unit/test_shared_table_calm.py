"""Calm budgets in the shared table: when the calm word counts, and who counted how many tokens."""

from pathlib import Path
from typing import Any

import pytest

from sglang_alloc import shared_table_layout as layout
from sglang_alloc.errors import SharedTableError
from sglang_alloc.shared_table import (
    CalmBudgets,
    CalmTokens,
    Fallback,
    Selection,
    SelectorWriter,
    SharedTable,
    WorkerCounters,
    WorkerSlot,
    calm_of_word,
    pack_calm_word,
    pack_word,
)

NOW_NS = 1_000 * 10**9
SECOND_NS = 10**9
FULL = Fallback("full")


def _selected(table: SharedTable) -> Selection:
    return table.selection(NOW_NS, SECOND_NS, FULL)


def _store_word(path: Path, word_index: int, word: int) -> None:
    """Store one word as another process would, and no other word with it."""
    with path.open("r+b") as stream:
        stream.seek(word_index * layout.WORD_BYTES)
        stream.write(word.to_bytes(layout.WORD_BYTES, "little"))


def _store_calm(table: SharedTable, generation: int, prefill: int, decode: int) -> None:
    _store_word(
        table.path,
        layout.CALM_WORD,
        pack_calm_word(generation, CalmBudgets(prefill, decode)),
    )


@pytest.fixture
def writer(table: SharedTable) -> SelectorWriter:
    """The table's writer, alive now."""
    writer = SelectorWriter.acquire(table)
    writer.beat(NOW_NS)
    return writer


def test_calm_budgets_are_read_as_they_were_written(
    table: SharedTable, writer: SelectorWriter
) -> None:
    other = SharedTable.open(table.path, writable=False)
    for calm in (CalmBudgets(12, 9), CalmBudgets(5, 7, 1), CalmBudgets(6, 12, 14)):
        generation = writer.write(5, 7, calm)
        for _ in range(2):
            assert _selected(other) == Selection("controller", generation, 5, 7, calm)
        assert other.calm_budgets() == table.calm_budgets() == calm


def test_a_new_table_and_a_writer_that_names_none_have_no_calm_budgets(
    table: SharedTable, writer: SelectorWriter
) -> None:
    assert table.calm_budgets() is None
    writer.write(5, 7, CalmBudgets(12, 12))
    assert _selected(table).calm == CalmBudgets(12, 12)
    generation = writer.write(5, 7)
    assert _selected(table) == Selection("controller", generation, 5, 7, None)
    assert table.calm_budgets() is None


def test_calm_budgets_come_into_force_when_their_word_is_seen_after_the_selector(
    table: SharedTable, writer: SelectorWriter
) -> None:
    writer.write(5, 7, CalmBudgets(12, 12))
    assert _selected(table).calm == CalmBudgets(12, 12)
    _store_word(table.path, layout.SELECTOR_WORD, pack_word(3, 4, 6))
    assert _selected(table) == Selection("controller", 3, 4, 6, None)
    assert table.calm_budgets() is None
    _store_calm(table, 3, 8, 9)
    assert _selected(table) == Selection("controller", 3, 4, 6, CalmBudgets(8, 9))
    assert table.calm_budgets() == CalmBudgets(8, 9)


def test_a_calm_word_ahead_of_its_selector_does_not_count(
    table: SharedTable, writer: SelectorWriter
) -> None:
    generation = writer.write(5, 7, CalmBudgets(12, 12))
    assert _selected(table).calm == CalmBudgets(12, 12)
    _store_calm(table, generation + 1, 10, 10)
    assert _selected(table) == Selection("controller", generation, 5, 7, None)


@pytest.mark.parametrize(
    "calm", [(4, 12), (12, 6), (13, 12), (12, 13), (2, 2), (0, 0), (2**16 - 1, 12)]
)
def test_calm_budgets_below_the_selector_or_without_a_row_do_not_count(
    table: SharedTable, writer: SelectorWriter, calm: tuple[int, int]
) -> None:
    generation = writer.write(5, 7)
    _store_calm(table, generation, *calm)
    assert _selected(table) == Selection("controller", generation, 5, 7, None)
    assert table.calm_budgets() is None


def test_a_writer_that_stores_the_selector_alone_has_no_calm_budgets(
    table: SharedTable, writer: SelectorWriter
) -> None:
    writer.write(5, 7, CalmBudgets(12, 12))
    _store_word(table.path, layout.SELECTOR_WORD, pack_word(3, 5, 7))
    assert _selected(table) == Selection("controller", 3, 5, 7, None)


def test_a_person_and_a_fallback_have_no_calm_budgets(
    table: SharedTable, writer: SelectorWriter
) -> None:
    generation = writer.write(5, 7, CalmBudgets(12, 12))
    table.set_override(3, 4, NOW_NS + SECOND_NS, "ana")
    assert _selected(table) == Selection("override", 1, 3, 4, None)
    table.clear_override()
    assert _selected(table).calm == CalmBudgets(12, 12)
    stale = table.selection(NOW_NS + 2 * SECOND_NS, SECOND_NS, Fallback("hold"))
    assert stale == Selection("fallback", generation, 5, 7, None)


@pytest.mark.parametrize(
    ("calm", "message"),
    [
        (CalmBudgets(13, 12), "A calm prefill budget of 13 .* has rows for 3 to 12"),
        (CalmBudgets(12, 2), "A calm decode budget of 2 .* has rows for 3 to 12"),
        (CalmBudgets(4, 12), "A calm prefill budget of 4 .* beside a prefill budget of 5"),
        (CalmBudgets(12, 6), "A calm decode budget of 6 .* beside a decode budget of 7"),
        (CalmBudgets(12, 12, 0), "fewer than 0 running requests .* Choose 1 to 65535"),
        (CalmBudgets(12, 12, 2**16), "fewer than 65536 running requests"),
    ],
)
def test_calm_budgets_that_no_worker_would_obey_are_not_written(
    table: SharedTable, writer: SelectorWriter, calm: CalmBudgets, message: str
) -> None:
    writer.write(5, 7, CalmBudgets(8, 8))
    with pytest.raises(SharedTableError, match=message):
        writer.write(5, 7, calm)
    assert _selected(table) == Selection("controller", 2, 5, 7, CalmBudgets(8, 8))


def test_calm_budgets_belong_to_their_generation_beyond_sixteen_bits(table: SharedTable) -> None:
    calm = CalmBudgets(12, 9, 14)
    word = pack_calm_word(0x1_0002, calm)
    assert calm_of_word(word, 0x1_0002) == calm
    assert calm_of_word(word, 0x1_0003) is None
    assert calm_of_word(0, 0x1_0000) is None


def test_each_rank_counts_its_tokens_beside_its_slot(table: SharedTable) -> None:
    table.worker_slot(0).store(WorkerCounters(pid=7), CalmTokens(1, 2, 3, 4))
    table.worker_slot(63).store(WorkerCounters(pid=8, rank=63), CalmTokens(5, 6, 7, 8))
    counted = SharedTable.open(table.path, writable=False).calm_tokens()
    assert len(counted) == 64
    assert counted[0] == CalmTokens(calm_prefill=1, prefill=2, calm_decode=3, decode=4)
    assert counted[63] == CalmTokens(5, 6, 7, 8)
    assert set(counted[1:63]) == {CalmTokens(0, 0, 0, 0)}
    assert [worker.pid for worker in table.worker_counters()] == [7, 8]
    assert table.override(NOW_NS) is None


class _ReadBetween(list[int]):
    """Words that somebody reads between any two stores."""

    def __init__(self, words: CalmTokens) -> None:
        super().__init__(words)
        self.seen: list[CalmTokens] = []

    def __setitem__(self, index: Any, word: Any) -> None:
        super().__setitem__(index, word)
        self.seen.append(CalmTokens(*self))


def test_who_reads_between_the_stores_never_sees_more_calm_tokens_than_tokens() -> None:
    words: Any = _ReadBetween(CalmTokens(9, 10, 0, 2))
    slot = WorkerSlot(memoryview(bytearray(16 * 8)).cast("Q"), words, lambda: True)
    slot.store(WorkerCounters(pid=7), CalmTokens(40, 41, 3, 5))
    assert words.seen[-1] == CalmTokens(40, 41, 3, 5)
    assert all(one.calm_prefill <= one.prefill for one in words.seen)
    assert all(one.calm_decode <= one.decode for one in words.seen)
