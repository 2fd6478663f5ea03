"""Calm steps, which leave no request waiting: what they obey, what is recorded and counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from table_factory import FINGERPRINT, make_full_tables

from sglang_alloc import plugin
from sglang_alloc.allocation_mode import Phase
from sglang_alloc.budget_follower import BudgetChange
from sglang_alloc.device_rows import DeviceRows
from sglang_alloc.enforcement import RoutedSlots
from sglang_alloc.enforcement_device import DeviceEnforcement
from sglang_alloc.plugin_queue import requests_running, requests_waiting
from sglang_alloc.request_budget import OwnBudget, OwnBudgets
from sglang_alloc.shared_table import (
    CalmBudgets,
    CalmTokens,
    Selection,
    SelectorWriter,
    publish_shared_table,
)
from sglang_alloc.worker import ServedModel, Worker, make_enforcement
from sglang_alloc.worker_settings import WorkerSettings
from sglang_alloc.worker_tables import enforcement_tables
from sglang_alloc_kernels.slot_rules import TWINS

LAYERS, TOP_K, EXPERTS = 3, 4, 8
FULL, LOW = LAYERS * TOP_K, LAYERS
MODEL = ServedModel("tiny", FINGERPRINT, (1, 2, 3), TOP_K, EXPERTS, 0, "cpu")
CONTROLLED = Selection("controller", 2, LOW, LOW, CalmBudgets(FULL, 2 * LAYERS))


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    publish_shared_table(tmp_path / "tiny.tbl", make_full_tables())
    made: list[Worker] = []

    def make(**settings: Any) -> Worker:
        worker = Worker(WorkerSettings(tmp_path / "tiny.tbl", **{"mode": "layer"} | settings))
        worker.bind(MODEL, make_enforcement(worker.table, worker.mode, "cpu"), metrics=None)
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.close()


@pytest.fixture
def worker(make_worker: Callable[..., Worker]) -> Worker:
    return make_worker()


def _put_in_force(worker: Worker, selection: Selection = CONTROLLED) -> None:
    worker.apply(BudgetChange(selection, worker.rule))


def _step(
    worker: Worker, phase: Phase, waiting: int | None, tokens: int, own: OwnBudgets | None = None
) -> torch.Tensor:
    """Run one forward behind which so many requests wait; return the slots each token kept."""
    worker.requests_waiting = waiting
    worker.begin_forward(phase, tokens, own)
    kept = torch.zeros(tokens, dtype=torch.int64)
    for layer_index in range(LAYERS):
        weights, ids = torch.rand(tokens, EXPERTS).softmax(dim=1).topk(TOP_K)
        kept += (worker.route(layer_index, RoutedSlots(weights, ids, 0)).ids >= 0).sum(dim=1)
    return kept


def _kept_per_token(worker: Worker, phase: Phase, waiting: int | None, tokens: int = 6) -> int:
    kept = _step(worker, phase, waiting, tokens)
    assert kept.min() == kept.max()
    return int(kept[0])


def test_a_step_that_leaves_nobody_waiting_obeys_the_calm_budgets(worker: Worker) -> None:
    _put_in_force(worker)
    for waiting, prefill, decode in ((0, FULL, 2 * LAYERS), (1, LOW, LOW), (0, FULL, 2 * LAYERS)):
        assert _kept_per_token(worker, "prefill", waiting) == prefill
        assert _kept_per_token(worker, "decode", waiting) == decode


@pytest.mark.parametrize("waiting", [0, 1])
def test_from_a_number_of_running_requests_on_no_step_is_calm(worker: Worker, waiting: int) -> None:
    _put_in_force(worker, CONTROLLED._replace(calm=CalmBudgets(FULL, FULL, running_requests=3)))
    for running in (0, 2, 3, 4, 2):
        worker.requests_running = running
        calm = FULL if running < 3 and not waiting else LOW
        assert _kept_per_token(worker, "prefill", waiting) == calm
        assert _kept_per_token(worker, "decode", waiting) == calm
    calm_tokens = 0 if waiting else 18
    assert worker.tokens.words() == CalmTokens(calm_tokens, 30, calm_tokens, 30)


def test_until_somebody_tells_who_waits_no_step_is_calm(worker: Worker) -> None:
    _put_in_force(worker)
    assert _kept_per_token(worker, "prefill", None) == LOW
    assert worker.tokens.words() == CalmTokens(0, 6, 0, 0)


@pytest.mark.parametrize("source", ["controller", "override", "fallback"])
def test_without_calm_budgets_calm_steps_obey_the_others(worker: Worker, source: Any) -> None:
    _put_in_force(worker)
    assert _kept_per_token(worker, "prefill", 0) == FULL
    _put_in_force(worker, Selection(source, 3, LOW, LOW))
    assert _kept_per_token(worker, "prefill", 0) == LOW
    assert _kept_per_token(worker, "decode", 0) == LOW


def test_a_change_of_the_calm_budgets_alone_reaches_the_next_calm_step(worker: Worker) -> None:
    writer = SelectorWriter.acquire(worker.table)
    for calm in (CalmBudgets(FULL, FULL), CalmBudgets(LOW, LOW), CalmBudgets(2 * LAYERS, FULL)):
        writer.write(LOW, LOW, calm)
        writer.beat(time.monotonic_ns())
        change = worker.poll(time.monotonic_ns())
        assert change is not None
        worker.apply(change)
        assert worker.poll(time.monotonic_ns()) is None
        assert _kept_per_token(worker, "prefill", 0) == calm.prefill_budget
        assert _kept_per_token(worker, "decode", 0) == calm.decode_budget
        assert _kept_per_token(worker, "decode", 4) == LOW


def test_budgets_are_handed_on_only_where_the_step_obeys_others(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[tuple[int, int]] = []
    monkeypatch.setattr(worker.enforcement, "set_budgets", lambda *pair: handed.append(pair))
    _put_in_force(worker)
    for waiting in (3, 2, 0, 0, 0, 1, 1, 0):
        _step(worker, "decode", waiting, 2)
    assert handed == [(LOW, LOW), (FULL, 2 * LAYERS), (LOW, LOW), (FULL, 2 * LAYERS)]


def test_with_thresholds_corrected_every_step_obeys_the_same_budgets(
    make_worker: Callable[..., Worker],
) -> None:
    worker = make_worker(mode="threshold", correct_drift=True)
    _put_in_force(worker)
    _step(worker, "decode", 0, 2)
    assert worker.calm is worker.in_force
    assert worker.enforcement.drops_slots()
    # Else what these tokens lost would be told as what the calm budgets lose.
    assert worker.tokens.words() == CalmTokens(0, 0, 0, 2)
    other = make_worker(mode="threshold")
    _put_in_force(other)
    assert other.calm[2:4] == (FULL, 2 * LAYERS)


def test_own_budgets_are_counted_against_what_the_step_obeys(worker: Worker) -> None:
    _put_in_force(worker)
    own = OwnBudgets([OwnBudget(LAYERS, 8), OwnBudget(FULL, FULL)], [1, 1])
    kept = _step(worker, "prefill", 1, 2, own)
    assert kept.tolist() == [LOW, FULL]
    assert worker.own_budget_tokens == {"full": 1, "floor": 0, "lower": 0}
    kept = _step(worker, "prefill", 0, 2, own)
    assert kept.tolist() == [8, FULL]
    assert worker.own_budget_tokens == {"full": 1, "floor": 0, "lower": 1}


def test_a_floor_holds_in_calm_steps_and_in_others(worker: Worker) -> None:
    """In both, beside a request that has what the step obeys: low budgets, and the calm ones."""
    _put_in_force(worker)
    own = OwnBudgets([OwnBudget(6, FULL), None], [1, 1])
    assert _step(worker, "prefill", 1, 2, own).tolist() == [6, LOW]
    assert worker.own_budget_tokens == {"full": 0, "floor": 1, "lower": 0}
    assert _step(worker, "prefill", 0, 2, own).tolist() == [FULL, FULL]
    assert worker.own_budget_tokens == {"full": 0, "floor": 1, "lower": 0}


def test_the_step_record_and_the_acknowledged_budgets(
    make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = make_worker(step_record=tmp_path / "steps")
    _put_in_force(worker)
    _kept_per_token(worker, "prefill", 2, tokens=40)
    _kept_per_token(worker, "decode", 0, tokens=3)
    lines = (tmp_path / "steps" / "rank0.csv").read_text().splitlines()
    assert [line.rpartition(",")[0] for line in lines[1:]] == [
        f"1,controller,2,prefill,{LOW},{LOW},40,0",
        f"2,controller,2,decode,{FULL},{2 * LAYERS},3,1",
    ]
    counters = worker.table.worker_counters()[0]
    assert (counters.prefill_budget, counters.decode_budget) == (LOW, LOW)


def test_tokens_are_counted_by_phase_and_by_who_waited(worker: Worker) -> None:
    _step(worker, "prefill", 0, 40)
    _step(worker, "prefill", 5, 2)
    _step(worker, "decode", 1, 7)
    worker.report(time.monotonic_ns())
    assert worker.table.calm_tokens()[0] == CalmTokens(40, 42, 0, 7)
    assert worker.table.calm_tokens()[1] == CalmTokens()


def test_on_a_device_a_step_of_other_budgets_costs_one_copy_and_one_of_the_same_none(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is in the order of the forwards' stream, so a forward under way keeps its rows."""
    tables = enforcement_tables(worker.table, "layer")
    device = DeviceEnforcement(tables, torch.device("cpu"), TWINS)
    rows = device._rows
    copied: list[np.ndarray] = []
    load = DeviceRows.load

    def counted(self: DeviceRows, phase: Phase, budget: int) -> None:
        before = self._loaded
        load(self, phase, budget)
        if self._loaded != before:
            copied.append(rows.of(phase).limits.numpy().copy())

    monkeypatch.setattr(DeviceRows, "load", counted)
    worker.enforcement = device
    worker._on_device = device
    _put_in_force(worker)
    addresses = device.addresses()
    kept = [_kept_per_token(worker, "decode", waiting) for waiting in (1, 1, 0, 0, 0, 2, 0)]
    assert kept == [LOW, LOW, *[2 * LAYERS] * 3, LOW, 2 * LAYERS]
    assert [int(limits.sum()) for limits in copied] == [LOW, 2 * LAYERS, LOW, 2 * LAYERS]
    assert device.addresses() == addresses


def _scheduler(waiting: int, prealloc: object = None, running: int = 0) -> Any:
    return SimpleNamespace(
        waiting_queue=[object()] * waiting,
        running_batch=SimpleNamespace(reqs=[object()] * running),
        disagg_decode_prealloc_queue=prealloc,
    )


def _batch(*, decoding: int | None = None, is_mixed: bool = False) -> Any:
    reqs = None if decoding is None else [object()] * decoding
    mode = SimpleNamespace(is_mixed=lambda: is_mixed)
    return SimpleNamespace(forward_mode=mode, decoding_reqs=reqs)


def _without_memory(*are_ready: bool, retracted: int = 0) -> object:
    queue = [SimpleNamespace(waiting_for_input=is_ready) for is_ready in are_ready]
    return SimpleNamespace(queue=queue, retracted_queue=[object()] * retracted)


@pytest.mark.parametrize(
    ("scheduler", "waiting"),
    [
        (_scheduler(0), 0),
        (_scheduler(3), 3),
        (_scheduler(0, _without_memory()), 0),
        (_scheduler(0, _without_memory(False, False)), 0),
        (_scheduler(1, _without_memory(True, False, True, retracted=4)), 7),
    ],
)
def test_whoever_waits_for_this_server_is_counted(scheduler: Any, waiting: int) -> None:
    assert requests_waiting(scheduler) == waiting


@pytest.mark.parametrize(
    ("scheduler", "batch", "running"),
    [
        (_scheduler(2, running=3), _batch(), 3),
        (_scheduler(2, running=3), _batch(decoding=2), 3),  # left from when it was mixed
        (_scheduler(2), _batch(decoding=2, is_mixed=True), 2),
        (_scheduler(2, running=3), _batch(is_mixed=True), 3),
    ],
)
def test_whoever_is_past_its_prefill_is_running(scheduler: Any, batch: Any, running: int) -> None:
    assert requests_running(scheduler, batch) == running


def test_the_hook_tells_the_worker_before_each_batch(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = plugin._Process()
    monkeypatch.setattr(plugin, "_process", process)
    plugin._before_run_batch(_scheduler(3), _batch())
    assert worker.requests_waiting is None
    process.worker = worker
    for waiting, running in ((3, 2), (0, 0), (1, 5)):
        scheduler = _scheduler(waiting, running=running)
        plugin._before_run_batch(scheduler, _batch(), pp_proxy_tensors=None)
        assert (worker.requests_waiting, worker.requests_running) == (waiting, running)
