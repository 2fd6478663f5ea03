"""A worker following a shared table: what it announces, puts in force, measures and refuses."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from table_factory import FINGERPRINT, make_full_tables, make_tables

from sglang_alloc.allocation_mode import Mode
from sglang_alloc.budget_follower import BudgetChange, BudgetFollower
from sglang_alloc.enforcement import RoutedSlots
from sglang_alloc.enforcement_device import DeviceEnforcement
from sglang_alloc.enforcement_host import HostEnforcement
from sglang_alloc.errors import ModelMismatchError, UnsupportedServerError
from sglang_alloc.priority_floors import PriorityFloor
from sglang_alloc.request_budget import OwnBudget, OwnBudgets
from sglang_alloc.shared_table import (
    Fallback,
    Selection,
    SelectorWriter,
    SharedTable,
    publish_shared_table,
)
from sglang_alloc.shared_table_words import source_code
from sglang_alloc.step_record import StepRecord
from sglang_alloc.worker import ServedModel, Worker, check_fits, make_enforcement
from sglang_alloc.worker_settings import FULL_QUALITY, WorkerSettings
from sglang_alloc.worker_tables import enforcement_tables

SECOND_NS = 10**9
LAYERS, TOP_K, EXPERTS = 3, 4, 8
FULL = LAYERS * TOP_K
RULE = "layer:digest"


def _make_model(**changes: Any) -> ServedModel:
    model = ServedModel(
        name="tiny",
        fingerprint=FINGERPRINT,
        layer_ids=(1, 2, 3),
        top_k=TOP_K,
        num_experts=EXPERTS,
        rank=0,
        device_type="cpu",
    )
    return model._replace(**changes)


@pytest.fixture
def table_path(tmp_path: Path) -> Path:
    publish_shared_table(tmp_path / "tiny.tbl", make_tables())
    return tmp_path / "tiny.tbl"


@pytest.fixture
def table(table_path: Path) -> Iterator[SharedTable]:
    with SharedTable.open(table_path) as table:
        yield table


@pytest.fixture
def worker(table_path: Path) -> Iterator[Worker]:
    worker = Worker(WorkerSettings(table_path))
    enforcement = make_enforcement(worker.table, worker.mode, "cpu")
    worker.bind(_make_model(), enforcement, metrics=None)
    yield worker
    worker.close()


def _make_slots(tokens: int = 6) -> RoutedSlots:
    weights, ids = torch.rand(tokens, EXPERTS).softmax(dim=1).topk(TOP_K)
    return RoutedSlots(weights, ids, 0)


def test_without_a_controller_the_fallback_is_announced_once(table: SharedTable) -> None:
    follower = BudgetFollower(table, RULE, 10.0, FULL_QUALITY)
    change = follower.poll(SECOND_NS)
    assert change is not None
    assert change.selection[0] == "fallback"
    assert change.selection[2:] == (FULL, FULL, None)
    assert follower.poll(2 * SECOND_NS) is None


def test_a_new_selector_is_announced_and_a_stale_heartbeat_falls_back(table: SharedTable) -> None:
    follower = BudgetFollower(table, RULE, 10.0, Fallback("budget", 5, 5))
    writer = SelectorWriter.acquire(table)
    writer.beat(100 * SECOND_NS)
    generation = writer.write(4, 7)
    change = follower.poll(101 * SECOND_NS)
    assert change is not None
    assert change.selection == Selection("controller", generation, 4, 7)
    assert follower.poll(102 * SECOND_NS) is None
    stale = follower.poll(111 * SECOND_NS)
    writer.close()
    assert stale is not None
    assert stale.selection[0] == "fallback"
    assert stale.selection[2:] == (5, 5, None)


def test_an_applied_change_is_enforced_and_acknowledged(worker: Worker, table: SharedTable) -> None:
    table.set_override(LAYERS, FULL, time.monotonic_ns() + 60 * SECOND_NS, "test")
    change = worker.poll(time.monotonic_ns())
    assert change is not None
    worker.apply(change)
    worker.begin_forward("prefill", 6)
    for layer_index in range(LAYERS):
        assert ((worker.route(layer_index, _make_slots()).ids >= 0).sum(dim=1) == 1).all()
    worker.begin_forward("decode", 6)
    slots = _make_slots()
    assert worker.route(0, slots) is slots
    counters = table.worker_counters()[0]
    assert counters.acknowledged_source == source_code("override")
    assert (counters.prefill_budget, counters.decode_budget) == (LAYERS, FULL)


def test_falling_back_from_a_controller_is_counted(worker: Worker) -> None:
    _apply(worker, "controller", 2, 5, 5)
    _apply(worker, "override", 1, 4, 4)
    _apply(worker, "fallback", 2, FULL, FULL)
    _apply(worker, "fallback", 3, FULL, FULL)
    assert worker.fallbacks == 1


def test_an_override_that_expires_without_a_controller_is_no_fallback(worker: Worker) -> None:
    _apply(worker, "fallback", 1, FULL, FULL)
    _apply(worker, "override", 1, 4, 4)
    _apply(worker, "fallback", 1, FULL, FULL)
    assert worker.fallbacks == 0


def _apply(worker: Worker, *selection: Any) -> None:
    worker.apply(BudgetChange(Selection(*selection), worker.rule))


def test_ranks_whose_kernel_routes_other_layers_stop(table: SharedTable, worker: Worker) -> None:
    worker.agree_on("0,1,2")
    change = worker.poll(time.monotonic_ns())
    assert change is not None
    worker.apply(change)
    other = dataclasses.replace(change, rule=change.rule.removesuffix(",2"))
    with pytest.raises(UnsupportedServerError, match=r"0,1,2 and the leading rank .*:0,1 "):
        worker.apply(other)


@pytest.mark.parametrize("rule", ["token:{digest}", "layer:{other}"])
def test_a_rank_that_means_other_quotas_by_a_budget_stops(worker: Worker, rule: str) -> None:
    digest = worker.table.payload_digest
    foreign = rule.format(digest=digest, other="00" * 32)
    with pytest.raises(UnsupportedServerError, match="give all ranks the same table and settings"):
        worker.apply(BudgetChange(Selection("controller", 2, 5, 5), foreign))
    assert worker.in_force.generation == 0


def test_a_layer_that_routes_elsewhere_stops_the_second_forward(worker: Worker) -> None:
    worker.watch_layers()
    worker.begin_forward("prefill", 6)
    for layer_index in (0, 2):
        worker.route(layer_index, _make_slots())
    with pytest.raises(UnsupportedServerError, match="the MoE layers 2 had not routed"):
        worker.begin_forward("decode", 6)


def test_a_layer_that_routes_elsewhere_in_decode_alone_stops_it_too(worker: Worker) -> None:
    worker.begin_forward("prefill", 6)
    for layer_index in range(LAYERS):
        worker.route(layer_index, _make_slots())
    worker.begin_forward("decode", 6)
    worker.route(0, _make_slots())
    with pytest.raises(UnsupportedServerError, match="forward of decode, the MoE layers 2, 3 had"):
        worker.begin_forward("prefill", 6)


def test_once_every_layer_has_routed_in_a_phase_nothing_is_watched(worker: Worker) -> None:
    worker.begin_capture("decode")
    for layer_index in range(LAYERS):
        worker.route(layer_index, _make_slots())
    worker.begin_forward("prefill", 6)
    for layer_index in range(LAYERS):
        worker.route(layer_index, _make_slots())
    worker.begin_forward("decode", 6)  # as a replayed graph: no layer calls Python
    worker.begin_forward("decode", 6)
    worker.begin_forward("prefill", 6)
    assert worker.steps == 4


def test_measured_activations_are_the_kept_slots(worker: Worker) -> None:
    _apply(worker, "override", 1, 2 * LAYERS, 2 * LAYERS)
    worker.begin_forward("decode", 6)
    kept = [worker.route(layer, _make_slots()) for layer in range(LAYERS)]
    measured = worker.statistics.take_recent("decode")
    assert measured.activations == sum(int((slots.ids >= 0).sum()) for slots in kept)
    assert measured.activations_per_token() == 2 * LAYERS
    ratio = measured.kept_mass_ratio()
    assert ratio is not None
    assert 0.25 < ratio < 1.0
    assert worker.statistics.take_recent("decode").activations_per_token() is None


def test_a_broken_request_does_not_end_the_measuring_or_the_server(
    worker: Worker, table: SharedTable
) -> None:
    """A router's NaN is the matter of its own request: the counters stay numbers."""
    weights, ids = torch.tensor([[0.6, 0.4, 0.0, 0.0], [float("nan")] * 4]), torch.zeros(2, 4).int()
    worker.begin_forward("decode", 2)
    for layer in range(3):
        worker.route(layer, RoutedSlots(weights, ids, 0))
    worker.report(time.monotonic_ns())
    assert worker.statistics.by_phase["decode"].mass == pytest.approx(3.0)
    assert table.worker_counters()[0].kept_mass_millionths == 1_000_000


def test_own_budgets_that_fit_no_forward_leave_it_at_the_budget_in_force(worker: Worker) -> None:
    """Better than a server that ends: nobody knows which of its tokens they belong to."""
    full = OwnBudget(FULL, FULL)
    worker.apply(BudgetChange(Selection("controller", 1, 3, 3), worker.rule))
    worker.begin_forward("decode", 2, OwnBudgets([full], [5]))
    kept = worker.route(0, RoutedSlots(torch.rand(2, 4), torch.zeros(2, 4).int(), 0))
    assert ((kept.ids >= 0).sum(dim=1) == 1).all()
    assert worker.own_budgets_ignored == 1
    assert worker.own_budget_tokens == {"full": 0, "floor": 0, "lower": 0}


def test_ranks_with_other_floors_stop(table_path: Path, worker: Worker) -> None:
    change = worker.poll(time.monotonic_ns())
    assert change is not None
    for floors in ((PriorityFloor(5, 7),), (PriorityFloor(5, None),)):
        other = Worker(WorkerSettings(table_path, priority_floors=floors))
        assert other.rule != worker.rule
        other.table.close()
        with pytest.raises(UnsupportedServerError, match=r"floors of priorities"):
            worker.apply(dataclasses.replace(change, rule=other.rule))


def test_only_a_sample_of_the_forwards_is_measured(worker: Worker) -> None:
    for _ in range(32):
        worker.begin_forward("decode", 3)
        for layer_index in range(LAYERS):
            worker.route(layer_index, _make_slots())
    assert worker.statistics.by_phase["decode"].forwards == 32
    assert worker.statistics.by_phase["decode"].sampled_forwards == 2


def test_a_step_record_on_a_full_disk_ends_and_its_server_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = StepRecord(tmp_path, 0)
    written = (tmp_path / "rank0.csv").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (written, limits[1]))
    try:
        for step in (1, 2):
            record.add(step, Selection("override", 1, 5, 5), "decode", 3, 0)
        record.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (told,) = [entry.message for entry in caplog.records]
    assert "ends the step record" in told
    assert (tmp_path / "rank0.csv").stat().st_size == written


def test_the_step_record_holds_one_line_per_forward(table_path: Path, tmp_path: Path) -> None:
    worker = Worker(WorkerSettings(table_path, step_record=tmp_path / "steps"))
    worker.bind(_make_model(), make_enforcement(worker.table, "layer", "cpu"), metrics=None)
    _apply(worker, "controller", 9, 5, 6)
    worker.begin_forward("prefill", 40)
    for layer_index in range(LAYERS):
        worker.route(layer_index, _make_slots())
    worker.begin_forward("decode", 2)
    worker.close()
    lines = (tmp_path / "steps" / "rank0.csv").read_text().splitlines()
    told = [line.rpartition(",") for line in lines[1:]]
    assert [one for one, _, _ in told] == [
        "1,controller,9,prefill,5,6,40,0",
        "2,controller,9,decode,5,6,2,0",
    ]
    first_ns, second_ns = (int(begun_ns) for _, _, begun_ns in told)
    assert 0 < first_ns < second_ns


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_ids": (1, 2)}, "MoE layers: table 3, model 2"),
        ({"layer_ids": (0, 1, 2)}, "MoE layer ids"),
        ({"top_k": 8}, "top-k: table 4, model 8"),
        ({"num_experts": 64}, "experts: table 8, model 64"),
        ({"fingerprint": "ff" * 32}, "model fingerprint"),
    ],
)
def test_a_table_of_another_model_is_named_and_refused(
    table: SharedTable, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelMismatchError, match=named):
        check_fits(table, _make_model(**change))


def test_prefill_uses_its_own_rows_where_the_table_has_them(tmp_path: Path) -> None:
    publish_shared_table(tmp_path / "full.tbl", make_full_tables())
    with SharedTable.open(tmp_path / "full.tbl") as full:
        tables = enforcement_tables(full, "threshold")
        assert (tables.prefill.quotas == full.section("prefill_quotas")).all()
        assert (tables.decode.quotas == full.section("quotas")).all()
        assert tables.prefill.thresholds is not None
        assert (tables.prefill.thresholds == full.section("prefill_thresholds")).all()


@pytest.mark.parametrize(
    ("mode", "prefill", "decode"),
    [
        ("layer", "prefill_quotas", "quotas"),
        ("threshold", "prefill_threshold_quotas", "threshold_quotas"),
        ("union", "prefill_threshold_quotas", "union_quotas"),
    ],
)
def test_the_quotas_shown_are_those_of_the_mode(
    mode: Mode, prefill: str, decode: str, tmp_path: Path
) -> None:
    publish_shared_table(tmp_path / "full.tbl", make_full_tables())
    with SharedTable.open(tmp_path / "full.tbl") as full:
        tables = enforcement_tables(full, mode)
        for phase, section in (("prefill", prefill), ("decode", decode)):
            assert (tables.quotas_of(phase) == full.section(section)).all()  # type: ignore[arg-type]


def test_the_device_decides_the_implementation(table: SharedTable) -> None:
    assert isinstance(make_enforcement(table, "token", "cpu"), HostEnforcement)
    assert isinstance(make_enforcement(table, "token", "meta"), DeviceEnforcement)


def test_mode_union_is_served_on_a_device_with_rows_of_its_own(tmp_path: Path) -> None:
    publish_shared_table(tmp_path / "full.tbl", make_full_tables())
    with SharedTable.open(tmp_path / "full.tbl") as full:
        assert isinstance(make_enforcement(full, "union", "meta"), DeviceEnforcement)
