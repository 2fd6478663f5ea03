"""The shared table in one process: what is published is read, and who decides the budgets."""

import fcntl
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_factory import FINGERPRINT, make_full_tables, make_tables, publish_and_open

from sglang_alloc import shared_table_reader
from sglang_alloc.errors import SharedTableError, TableFormatError
from sglang_alloc.shared_table import (
    OVERRIDE_MAX_NS,
    Fallback,
    Selection,
    Selector,
    SelectorWriter,
    SharedTable,
    TableShape,
    WorkerCounters,
    is_newer_generation,
    next_generation,
    pack_word,
    publish_shared_table,
    unpack_word,
)

NOW_NS = 1_000 * 10**9
SECOND_NS = 10**9
FULL = Fallback("full")


def test_a_published_table_holds_the_budget_tables_unchanged(tmp_path: Path) -> None:
    tables = make_full_tables()
    publish_shared_table(tmp_path / "full.tbl", tables, mode_note="threshold")
    table = SharedTable.open(tmp_path / "full.tbl", writable=False)
    assert table.shape == TableShape(3, 4, 8, 3, 12)
    assert (table.model_id, table.fingerprint, table.mode_note) == (
        "tiny-moe",
        FINGERPRINT,
        "threshold",
    )
    for name, array in tables.arrays().items():
        if name not in {"budgets", "sensitivity", "prefill_sensitivity"}:
            assert table.section(name).dtype == array.dtype
            np.testing.assert_array_equal(table.section(name), array)
    np.testing.assert_array_equal(table.layer_ids, tables.layer_ids)


def test_a_new_table_asks_for_full_quality_and_has_no_controller(table: SharedTable) -> None:
    assert table.selector() == Selector(1, 12, 12)
    assert (table.heartbeat_ns(), table.writer_epoch(), table.writer_pid()) == (0, 0, 0)
    assert table.override(NOW_NS) is None
    assert table.worker_counters() == []


def test_sections_are_read_only_and_outlive_the_table(table: SharedTable) -> None:
    quotas = table.section("quotas")
    table.close()
    table.close()
    assert quotas[-1].tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="read-only"):
        quotas[0, 0] = 2


def test_a_section_that_was_not_published_is_named(table: SharedTable) -> None:
    assert not table.has_section("thresholds")
    with pytest.raises(SharedTableError, match="no section 'thresholds', only quotas"):
        table.section("thresholds")


def test_another_mapping_sees_the_word_that_was_written(table: SharedTable) -> None:
    other = SharedTable.open(table.path, writable=False)
    SelectorWriter.acquire(table).write(5, 7)
    assert other.selector_word() == pack_word(2, 5, 7)
    assert other.selector() == table.selector() == Selector(2, 5, 7)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1))
def test_a_word_holds_generation_and_both_budgets(
    generation: int, prefill_budget: int, decode_budget: int
) -> None:
    word = pack_word(generation, prefill_budget, decode_budget)
    assert 0 <= word < 2**64
    assert unpack_word(word) == (generation, prefill_budget, decode_budget)


@given(st.integers(1, 2**32 - 1), st.integers(1, 1000))
def test_later_generations_are_newer_across_the_wrap(start: int, changes: int) -> None:
    generation = start
    for _ in range(changes):
        generation = next_generation(generation)
    assert generation != 0
    assert is_newer_generation(generation, start)
    assert not is_newer_generation(start, generation)
    assert not is_newer_generation(start, start)


def _controlled(table: SharedTable, heartbeat_ns: int) -> None:
    writer = SelectorWriter.acquire(table)
    writer.write(5, 7)
    writer.beat(heartbeat_ns)
    writer.close()


@pytest.mark.parametrize("age_ns", [-SECOND_NS, 0, 10 * SECOND_NS])
def test_a_fresh_heartbeat_puts_the_selector_in_force(table: SharedTable, age_ns: int) -> None:
    _controlled(table, NOW_NS - age_ns)
    for _ in range(2):
        selection = table.selection(NOW_NS, 10 * SECOND_NS, FULL)
        assert selection == Selection("controller", 2, 5, 7)


@pytest.mark.parametrize("age_ns", [-SECOND_NS - 1, 10 * SECOND_NS + 1, NOW_NS])
@pytest.mark.parametrize(
    ("fallback", "budgets"),
    [(FULL, (12, 12)), (Fallback("hold"), (5, 7)), (Fallback("budget", 4, 6), (4, 6))],
)
def test_a_stale_future_or_absent_heartbeat_puts_the_fallback_in_force(
    table: SharedTable, age_ns: int, fallback: Fallback, budgets: tuple[int, int]
) -> None:
    _controlled(table, NOW_NS - age_ns)
    for _ in range(2):
        selection = table.selection(NOW_NS, 10 * SECOND_NS, fallback)
        assert selection == Selection("fallback", 2, *budgets)


def test_no_heartbeat_is_stale_even_just_after_boot(table: SharedTable) -> None:
    assert table.selection(SECOND_NS, 10 * SECOND_NS, FULL).source == "fallback"


def test_a_fallback_without_a_row_means_full_quality(table: SharedTable) -> None:
    selection = table.selection(NOW_NS, SECOND_NS, Fallback("budget", 2, 99))
    assert selection == Selection("fallback", 1, 12, 12)


@pytest.mark.parametrize("word", [0, pack_word(9, 2, 7), pack_word(9, 7, 13), 2**64 - 1])
@pytest.mark.parametrize("fallback", [FULL, Fallback("hold")])
def test_a_selector_that_names_no_row_means_full_quality(
    table: SharedTable, word: int, fallback: Fallback
) -> None:
    _controlled(table, NOW_NS)
    with table.path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(word.to_bytes(8, "little"))
    selection = table.selection(NOW_NS, SECOND_NS, fallback)
    assert selection == Selection("fallback", word >> 32, 12, 12)


def test_an_override_comes_before_the_controller_until_its_deadline(table: SharedTable) -> None:
    _controlled(table, NOW_NS)
    table.set_override(3, 4, NOW_NS + SECOND_NS, "ana")
    override = table.override(NOW_NS)
    assert override is not None
    assert override == (3, 4, 1, NOW_NS + SECOND_NS, "ana")
    assert table.selection(NOW_NS, SECOND_NS, FULL) == Selection("override", 1, 3, 4)
    after_ns = NOW_NS + SECOND_NS
    assert table.override(after_ns) is None
    assert table.selection(after_ns, SECOND_NS, FULL) == Selection("controller", 2, 5, 7)


def test_a_cleared_override_ends_at_once_and_the_next_one_is_newer(table: SharedTable) -> None:
    table.set_override(3, 4, NOW_NS + SECOND_NS, "ana")
    table.clear_override()
    assert table.override(NOW_NS) is None
    table.set_override(5, 6, NOW_NS + SECOND_NS, "ben")
    override = table.override(NOW_NS)
    assert override is not None
    assert (override.generation, override.actor) == (2, "ben")


def test_an_override_from_before_a_reboot_is_not_in_force(table: SharedTable) -> None:
    table.set_override(3, 4, NOW_NS + OVERRIDE_MAX_NS + 1, "ana")
    assert table.override(NOW_NS) is None
    assert table.selection(NOW_NS, SECOND_NS, FULL).source == "fallback"


@pytest.mark.parametrize("offset", [4160, 4168, 4176, 4224])
def test_a_half_written_override_is_not_in_force(table: SharedTable, offset: int) -> None:
    table.set_override(3, 4, NOW_NS + SECOND_NS, "ana")
    with table.path.open("r+b") as stream:
        stream.seek(offset)
        old = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([old[0] ^ 1]))
    assert table.override(NOW_NS) is None
    assert table.selection(NOW_NS, SECOND_NS, FULL).source == "fallback"


def test_a_setter_that_was_stopped_in_the_middle_is_not_waited_for_for_ever(
    table: SharedTable,
) -> None:
    order = (3, 4, NOW_NS + SECOND_NS, "ana")
    with table.path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for setting in (table.clear_override, lambda: table.set_override(*order)):
            with pytest.raises(SharedTableError, match="Another process has been setting"):
                setting()
    table.set_override(*order)
    assert table.override(NOW_NS) is not None


def test_two_threads_that_set_an_override_take_turns(
    table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else words of both could stand there together, and readers would see neither order."""
    inside, go_on = threading.Event(), threading.Event()
    store = shared_table_reader.store_override

    def store_slowly(*arguments: Any) -> None:
        inside.set()
        assert go_on.wait(10)
        store(*arguments)

    monkeypatch.setattr(shared_table_reader, "store_override", store_slowly)
    order = (NOW_NS + SECOND_NS, "ana")
    first = threading.Thread(target=table.set_override, args=(3, 4, *order))
    second = threading.Thread(target=table.clear_override)
    first.start()
    assert inside.wait(10)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go_on.set()
    first.join()
    second.join()
    assert table.override(NOW_NS) is None


def test_a_long_actor_is_cut_between_characters(table: SharedTable) -> None:
    table.set_override(3, 4, NOW_NS + SECOND_NS, "x" + "é" * 60)
    override = table.override(NOW_NS)
    assert override is not None
    assert override.actor == "x" + "é" * 31


@pytest.mark.parametrize(("prefill_budget", "decode_budget"), [(2, 5), (5, 13)])
def test_a_budget_without_a_row_is_refused_with_the_range(
    table: SharedTable, prefill_budget: int, decode_budget: int
) -> None:
    with pytest.raises(SharedTableError, match="has rows for 3 to 12"):
        table.set_override(prefill_budget, decode_budget, NOW_NS, "ana")


def test_a_table_opened_to_look_only_changes_nothing(table: SharedTable) -> None:
    looking = SharedTable.open(table.path, writable=False)
    for change in (
        lambda: looking.set_override(3, 4, NOW_NS, "ana"),
        looking.clear_override,
        lambda: looking.worker_slot(0),
        lambda: SelectorWriter.acquire(looking),
    ):
        with pytest.raises(SharedTableError, match="look only"):
            change()


def test_the_counters_of_each_rank_come_back(table: SharedTable) -> None:
    first = WorkerCounters(*range(1, 17))
    table.worker_slot(63).store(WorkerCounters(pid=7, rank=63))
    slot = table.worker_slot(0)
    slot.store(first)
    expected = first._replace(steps=99, last_step_ns=2**64 - 1)
    slot.store(expected)
    other = SharedTable.open(table.path, writable=False)
    assert other.worker_counters() == [expected, WorkerCounters(pid=7, rank=63)]


@pytest.mark.parametrize("rank", [-1, 64])
def test_a_rank_without_a_slot_is_refused(table: SharedTable, rank: int) -> None:
    with pytest.raises(SharedTableError, match="ranks 0 to 63"):
        table.worker_slot(rank)


def test_publishing_again_leaves_open_tables_alone_and_is_noticed(table: SharedTable) -> None:
    assert table.is_current()
    replacement = publish_and_open(table.path, model_id="another")
    SelectorWriter.acquire(replacement).write(5, 7)
    assert not table.is_current()
    assert replacement.is_current()
    assert replacement.publication_id != table.publication_id
    assert table.selector() == Selector(1, 12, 12)
    assert table.model_id == "tiny-moe"


def test_a_table_whose_file_is_gone_is_no_longer_current(table: SharedTable) -> None:
    table.path.unlink()
    assert not table.is_current()
    assert table.selector() == Selector(1, 12, 12)


def _overwrite(path: Path, content: bytes) -> None:
    """Change the file in place, as `cp` does, where publishing would rename."""
    path.write_bytes(content)


@pytest.mark.parametrize("left_bytes", [0, 100, 4096, 8192, 16383])
def test_a_file_shortened_in_place_means_fallback_and_not_a_crash(
    table: SharedTable, left_bytes: int
) -> None:
    _controlled(table, NOW_NS)
    slot = table.worker_slot(0)
    assert table.selection(NOW_NS, SECOND_NS, FULL).source == "controller"
    os.truncate(table.path, left_bytes)
    assert table.selection(NOW_NS, SECOND_NS, FULL) == Selection("fallback", 2, 12, 12)
    hold = Fallback("hold")
    assert table.selection(NOW_NS, SECOND_NS, hold) == Selection("fallback", 2, 5, 7)
    slot.store(WorkerCounters(pid=7))
    assert table.path.stat().st_size == left_bytes
    assert not table.is_current()


def test_a_file_overwritten_in_place_by_another_publication_means_fallback(
    table: SharedTable, tmp_path: Path
) -> None:
    other = publish_and_open(tmp_path / "other.tbl")
    _controlled(other, NOW_NS)
    slot = table.worker_slot(0)
    _overwrite(table.path, other.path.read_bytes())
    assert table.selection(NOW_NS, SECOND_NS, FULL) == Selection("fallback", 0, 12, 12)
    slot.store(WorkerCounters(pid=7))
    assert not table.is_current()
    with SharedTable.open(table.path) as reopened:
        assert reopened.worker_counters() == []


def test_a_file_rewritten_in_place_with_itself_goes_on(table: SharedTable) -> None:
    _controlled(table, NOW_NS)
    _overwrite(table.path, table.path.read_bytes())
    assert table.is_current()
    assert table.selection(NOW_NS, SECOND_NS, FULL) == Selection("controller", 2, 5, 7)


def test_whoever_must_write_to_a_lost_file_is_told_so(table: SharedTable) -> None:
    writer = SelectorWriter.acquire(table)
    os.truncate(table.path, 100)
    for action in (
        lambda: writer.write(5, 7),
        lambda: writer.beat(NOW_NS),
        lambda: table.set_override(5, 7, NOW_NS, "ana"),
        table.clear_override,
        table.worker_counters,
        lambda: table.override(NOW_NS),
    ):
        with pytest.raises(SharedTableError, match="shortened or overwritten in place"):
            action()


def test_publishing_states_the_time_and_leaves_no_other_file(table: SharedTable) -> None:
    assert 0 <= time.time_ns() - table.published_ns < 60 * SECOND_NS
    assert [entry.name for entry in table.path.parent.iterdir()] == ["tiny.tbl"]
    assert table.path.stat().st_mode & 0o777 == 0o660


def test_a_budget_that_does_not_fit_sixteen_bits_is_not_published(tmp_path: Path) -> None:
    wide = replace(
        make_tables(num_layers=3),
        top_k=30_000,
        num_experts=30_000,
        budgets=np.array([90_000], np.int32),
        quotas=np.full((1, 3), 30_000, np.int16),
        predicted_loss=np.zeros(1, np.float32),
    )
    with pytest.raises(TableFormatError, match="at most 65535"):
        publish_shared_table(tmp_path / "wide.tbl", wide)


def test_a_note_that_does_not_fit_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(TableFormatError, match="mode_note: expected at most 112"):
        publish_shared_table(tmp_path / "noted.tbl", make_tables(), mode_note="x" * 113)
