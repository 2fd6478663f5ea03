"""The hooks, with small objects in place of SGLang's, with a worker and without one."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from table_factory import FINGERPRINT, make_tables

from sglang_alloc import plugin, plugin_entry, plugin_proof
from sglang_alloc.budget_follower import BudgetChange
from sglang_alloc.compatibility import is_before
from sglang_alloc.compatibility_seams import DOWN_USES_TMA, SEAMS, TRITON_EXPERTS, ZEROS_IN_PLACE
from sglang_alloc.errors import ConfigurationError, UnsupportedServerError
from sglang_alloc.plugin_facts import num_shared_columns
from sglang_alloc.plugin_proof import prove_routing
from sglang_alloc.priority_floors import PriorityFloor
from sglang_alloc.request_budget import RequestRules
from sglang_alloc.shared_table import Fallback, Selection, publish_shared_table
from sglang_alloc.worker import ServedModel, Worker, make_enforcement
from sglang_alloc.worker_settings import Mode, WorkerSettings

LAYERS, TOP_K, EXPERTS = 3, 4, 8


class StandardTopKOutput(NamedTuple):
    """SGLang's, field by field; tests/compat checks that it is so in every release."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None


@pytest.fixture(scope="module")
def forward_mode() -> Any:
    """SGLang's real ForwardMode, whose import warns of what a CPU lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.model_executor.forward_batch_info import ForwardMode
    return ForwardMode


@pytest.fixture
def settings(tmp_path: Path) -> WorkerSettings:
    publish_shared_table(tmp_path / "tiny.tbl", make_tables(LAYERS, TOP_K, EXPERTS))
    return WorkerSettings(tmp_path / "tiny.tbl")


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process of its own, inert at first."""
    process = plugin._Process()
    monkeypatch.setattr(plugin, "_process", process)
    return process


@pytest.fixture
def worker(process: Any, settings: WorkerSettings) -> Iterator[Worker]:
    worker = Worker(settings)
    model = ServedModel("tiny", FINGERPRINT, (1, 2, 3), TOP_K, EXPERTS, 0, "cpu")
    worker.bind(model, make_enforcement(worker.table, worker.mode, "cpu"), metrics=None)
    process.settings, process.worker = settings, worker
    yield worker
    worker.close()


def _through_hook(
    weights: torch.Tensor, ids: torch.Tensor, topk_config: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what SGLang goes on with after the hook on a layer's routed slots."""
    given = {"topk_ids": ids, "topk_weights": weights, "topk_config": topk_config}
    changed = plugin._before_routed_slots(**given)
    now = given if changed is None else changed[1]
    return now["topk_weights"], now["topk_ids"]


class _Router:
    """Stands in for SGLang's TopK: its call reaches the hook, unless told to go around it.

    replaces_dropped: the last expert takes the place of dropped slots, as under
    `--ep-dispatch-algorithm`.
    """

    def __init__(
        self,
        process: Any,
        index: int,
        *,
        reaches_hook: bool = True,
        replaces_dropped: bool = False,
    ) -> None:
        self.topk_config = SimpleNamespace(top_k=TOP_K, num_shared_topk_slots=0)
        self.layer_id = index
        self._reaches_hook = reaches_hook
        self._replaces_dropped = replaces_dropped
        process.layer_index_of[id(self.topk_config)] = index

    def __call__(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> StandardTopKOutput:
        weights, ids = logits.softmax(dim=1).topk(TOP_K)
        if self._reaches_hook:
            weights, ids = _through_hook(weights, ids, self.topk_config)
        if self._replaces_dropped:
            ids = ids.masked_fill(ids < 0, EXPERTS - 1)
        return StandardTopKOutput(weights, ids, logits)


def _reduce(worker: Worker, budget: int) -> None:
    worker.apply(BudgetChange(Selection("override", 1, budget, budget), worker.rule))


def test_an_inert_plugin_touches_nothing(process: Any) -> None:
    assert plugin._before_routed_slots(topk_config=object()) is None
    plugin._before_decode_graphs(object())
    assert plugin._after_receive_requests(["a request"]) is None
    requests: list[Any] = []
    plugin._after_pull_requests(requests)
    assert requests == []


def test_a_scheduler_without_a_bound_model_refuses_its_first_iteration(
    process: Any, settings: WorkerSettings
) -> None:
    process.settings = settings
    with pytest.raises(RuntimeError, match="no model was bound"):
        plugin._after_pull_requests([])
    runner = SimpleNamespace(is_draft_worker=False)
    with pytest.raises(RuntimeError, match="no model was bound"):
        plugin._before_forward(runner, SimpleNamespace(forward_mode=None))


@pytest.mark.parametrize(
    ("priorities", "smaller_is_urgent", "urgent"),
    [((0, 5), True, "smaller"), ((5, 0), False, "larger")],
)
def test_floors_against_the_engines_order_are_refused_before_the_load(
    process: Any, priorities: tuple[int, ...], smaller_is_urgent: bool, urgent: str
) -> None:
    floors = tuple(map(PriorityFloor, priorities, (4, None)))
    process.request_rules = RequestRules("lower", 3, 12, floors)
    options = SimpleNamespace(schedule_low_priority_values_first=smaller_is_urgent)
    runner = SimpleNamespace(is_draft_worker=False, server_args=options)
    loads: list[object] = []
    with pytest.raises(RuntimeError, match=f"priorities are the {urgent} ones"):
        plugin._around_load_model(loads.append, runner)
    assert loads == []


@pytest.mark.parametrize(
    ("floors", "smaller_is_urgent"),
    [
        ((), True),
        ((PriorityFloor(5, None),), True),
        ((PriorityFloor(5, None),), False),
        ((PriorityFloor(0, 4), PriorityFloor(5, None)), False),
        ((PriorityFloor(5, 4), PriorityFloor(0, None)), True),
    ],
)
def test_floors_take_the_engines_order_of_priorities(
    process: Any, floors: tuple[PriorityFloor, ...], smaller_is_urgent: bool
) -> None:
    process.request_rules = RequestRules("lower", 3, 12, floors)
    plugin._order_priorities(SimpleNamespace(schedule_low_priority_values_first=smaller_is_urgent))
    assert process.request_rules == RequestRules("lower", 3, 12, floors, smaller_is_urgent)


def test_a_change_travels_with_the_requests_and_is_taken_out_again(worker: Worker) -> None:
    requests: list[Any] = ["a request"]
    plugin._after_pull_requests(requests)
    assert isinstance(requests[1], BudgetChange)
    assert plugin._after_receive_requests(requests) == ["a request"]
    assert worker.in_force.source == "fallback"
    plugin._after_pull_requests(unchanged := ["another"])
    assert unchanged == ["another"]


def test_a_rank_that_does_not_lead_announces_nothing(worker: Worker) -> None:
    assert plugin._after_pull_requests(None) is None


def test_the_last_of_several_changes_counts(worker: Worker) -> None:
    changes = [
        BudgetChange(Selection("controller", generation, 5, 6), worker.rule)
        for generation in (4, 5)
    ]
    assert plugin._after_receive_requests(changes) == []
    assert worker.in_force.generation == 5


@pytest.mark.parametrize(
    ("mode", "phase"),
    [
        ("DECODE", "decode"),
        ("TARGET_VERIFY", "decode"),
        ("EXTEND", "prefill"),
        ("MIXED", "prefill"),
        ("IDLE", None),
    ],
)
def test_every_forward_mode_has_its_phase(forward_mode: Any, mode: str, phase: str | None) -> None:
    assert plugin._phase(forward_mode[mode]) == phase


class _Recorder:
    """Stands in for SGLang's recorders of routing, both at once."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_select_experts(self, topk_ids: torch.Tensor) -> None:
        self.seen.append(topk_ids)

    def capture(self, layer_id: int, topk_indices: torch.Tensor) -> None:
        self.seen.append(topk_indices)


def test_sglangs_recorders_see_what_was_really_activated(
    worker: Worker, process: Any, engine_topk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, recorder = engine_topk._post_process_topk_ids, _Recorder()

    def hooked(**given: Any) -> Any:
        changed = plugin._before_routed_slots(**given)
        return original(**(given if changed is None else changed[1]))

    monkeypatch.setattr(engine_topk, "_post_process_topk_ids", hooked)
    for name in ("get_global_expert_distribution_recorder", "get_global_experts_capturer"):
        monkeypatch.setattr(engine_topk, name, lambda: recorder)
    config = engine_topk.TopKConfig(top_k=TOP_K, torch_native=True)
    process.layer_index_of[id(config)] = 0
    _reduce(worker, LAYERS)
    worker.begin_forward("decode", 5)
    logits = torch.randn(5, EXPERTS)
    routed = engine_topk.select_experts(torch.zeros(5, 8), logits, config, layer_id=1)
    assert ((routed.topk_ids >= 0).sum(dim=1) == 1).all()
    assert len(recorder.seen) == 2
    assert all(torch.equal(seen, routed.topk_ids) for seen in recorder.seen)


@pytest.mark.usefixtures("worker")
def test_the_triton_experts_filter_and_keep_their_buffer_unsorted_where_zeros_go_astray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = (*range(DOWN_USES_TMA), True, False)
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.5.23")
    assert plugin._before_triton_experts(*given) == (given, {"filter_expert": True})
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.5.22")
    args, _ = plugin._before_triton_experts(*given, filter_expert=False)
    (seam,) = (seam for seam in SEAMS if seam.target == TRITON_EXPERTS)
    assert seam.needs[DOWN_USES_TMA] == "down_moe_use_tma"
    assert args == (*range(DOWN_USES_TMA), False, False)
    by_name = plugin._before_triton_experts(0, down_moe_use_tma=True)
    assert by_name == ((0,), {"filter_expert": True, "down_moe_use_tma": False})


@pytest.mark.parametrize(
    ("change", "filtered"),
    [
        ({}, False),
        ({"block_shape": [128, 128]}, True),
        ({"per_channel_quant": True}, True),
        ({"a2_scale": torch.ones(1)}, True),
        ({"use_fp8_w8a8": False}, True),
    ],
)
@pytest.mark.usefixtures("worker")
def test_experts_with_one_fp8_scale_have_no_row_that_nobody_wrote(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], filtered: bool
) -> None:
    """Their scale is taken over all rows; the activation writes all if it is not told to filter."""
    plain = {"block_shape": None, "per_channel_quant": False, "a2_scale": None}
    given = {"use_fp8_w8a8": True, **plain, "filter_expert": False, **change}
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.5.23")
    _, kwargs = plugin._before_triton_experts(0, **given)
    assert kwargs["filter_expert"] == filtered
    assert kwargs.get("down_moe_use_tma", True) == filtered
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.5.22")
    if filtered:
        assert plugin._before_triton_experts(0, **given)[1]["filter_expert"]
        return
    with pytest.raises(UnsupportedServerError, match="upgrade SGLang"):
        plugin._before_triton_experts(0, **given)


@pytest.mark.usefixtures("process")
def test_without_a_worker_the_triton_experts_are_left_alone() -> None:
    plugin._process.worker = None
    assert plugin._before_triton_experts(1, filter_expert=False) == ((1,), {"filter_expert": False})


@pytest.mark.parametrize(
    ("version", "expected"), [("0.5.16", True), ("0.5.22.post1", True), ("0.5.23+cu130", False)]
)
def test_older_releases_are_told_from_0_5_23(version: str, expected: bool) -> None:
    assert is_before(version, ZEROS_IN_PLACE) == expected


def test_graphs_are_captured_for_the_phase_that_replays_them(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []
    monkeypatch.setattr(worker, "begin_capture", phases.append)
    plugin._before_decode_graphs(object())
    plugin._before_prefill_graphs(object())
    assert phases == ["decode", "prefill"]


def test_a_draft_models_forwards_and_layers_are_left_alone(worker: Worker, process: Any) -> None:
    _reduce(worker, LAYERS)
    draft = SimpleNamespace(is_draft_worker=True)
    plugin._before_forward(draft, SimpleNamespace(forward_mode=None))
    assert worker.steps == 0
    assert plugin._before_routed_slots(topk_config=object()) is None


def test_the_cpu_experts_run_the_kept_slots_only(worker: Worker, process: Any) -> None:
    router = _Router(process, 0)
    _reduce(worker, LAYERS)
    worker.begin_forward("decode", 2)
    routed = router(torch.zeros(2, 8), torch.randn(2, EXPERTS))
    seen = []

    def experts(layer: Any, rows: torch.Tensor, output: Any, config: Any) -> torch.Tensor:
        seen.append(output.topk_ids)
        return rows * output.topk_weights

    plugin._around_cpu_experts(experts, None, torch.ones(2, 8), routed, None)
    assert [ids.shape for ids in seen] == [(2, 1)]
    _reduce(worker, LAYERS * TOP_K)
    plugin._around_cpu_experts(experts, None, torch.ones(2, TOP_K), routed, None)
    assert seen[1] is routed.topk_ids


def test_the_proof_accepts_a_layer_that_obeys_and_leaves_full_quality(
    worker: Worker, process: Any
) -> None:
    for index in range(LAYERS):
        prove_routing(worker, index, _Router(process, index))
    assert not worker.enforcement.drops_slots()


def test_the_proof_refuses_a_layer_whose_hook_is_not_reached(worker: Worker, process: Any) -> None:
    worker.watch_layers()
    with pytest.raises(UnsupportedServerError, match="MoE layer 2 does not obey the budget"):
        prove_routing(worker, 1, _Router(process, 1, reaches_hook=False))
    assert not worker.enforcement.drops_slots()


@pytest.mark.parametrize("mode", ["threshold", "union"])
def test_the_proof_asks_thresholds_for_a_drop_however_low_they_are(
    process: Any, tmp_path: Path, mode: Mode
) -> None:
    """An engine that puts other experts in the place of dropped slots shows in no other way."""
    loss = make_tables(LAYERS, TOP_K).predicted_loss
    low = np.full((len(loss), LAYERS), 1e-6, np.float32)
    fields = {"thresholds": low, "union_thresholds": low, "union_predicted_loss": loss}
    tables = make_tables(LAYERS, TOP_K, EXPERTS, **fields)
    publish_shared_table(tmp_path / "low.tbl", tables)
    worker = Worker(WorkerSettings(tmp_path / "low.tbl", mode=mode))
    model = ServedModel("tiny", FINGERPRINT, (1, 2, 3), TOP_K, EXPERTS, 0, "cpu")
    worker.bind(model, make_enforcement(worker.table, worker.mode, "cpu"), metrics=None)
    process.worker = worker
    obeys, replaces = _Router(process, 0), _Router(process, 1, replaces_dropped=True)
    prove_routing(worker, 0, obeys)
    with pytest.raises(UnsupportedServerError, match="MoE layer 2 does not obey the budget"):
        prove_routing(worker, 1, replaces)
    _reduce(worker, LAYERS)
    worker.begin_forward("decode", 2)
    assert (obeys(torch.zeros(2, 8), torch.zeros(2, EXPERTS)).topk_ids >= 0).all()
    worker.close()


def test_the_proof_refuses_a_backend_that_routes_in_its_kernel(worker: Worker) -> None:
    def bypassed(hidden_states: torch.Tensor, logits: torch.Tensor) -> object:
        return SimpleNamespace(topk_ids=None)

    with pytest.raises(UnsupportedServerError, match="routes inside its kernel"):
        prove_routing(worker, 0, bypassed)


def test_the_number_of_shared_columns_is_read_under_either_name() -> None:
    assert num_shared_columns(SimpleNamespace(num_shared_topk_slots=1)) == 1
    assert num_shared_columns(SimpleNamespace(num_fused_shared_experts=2)) == 2
    assert num_shared_columns(SimpleNamespace(num_fused_shared_experts=None)) == 0


def test_a_hook_under_a_foreign_wrapper_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook() -> None: ...

    def wrapped() -> None:
        hook()

    def foreign() -> None: ...

    foreign.__wrapped__ = wrapped  # type: ignore[attr-defined]
    monkeypatch.setattr(plugin_proof.pkgutil, "resolve_name", lambda target: foreign)
    assert plugin_proof.is_hooked("any.target", hook)
    assert not plugin_proof.is_hooked("any.target", test_a_hook_under_a_foreign_wrapper_is_found)


def test_a_fallback_without_a_row_is_refused_before_anything_is_patched(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "verify_seams", lambda resolve: [])  # has its own tests
    beyond = WorkerSettings(settings.table_path, fallback=Fallback("budget", 99, 99))
    with pytest.raises(ConfigurationError, match="99"):
        plugin._check_before_hooks(beyond)


def test_without_a_table_the_entry_point_imports_nothing_of_ours() -> None:
    script = (
        "import sys, sglang_alloc.plugin_entry as e; e.register();"
        "assert 'torch' not in sys.modules and 'sglang_alloc.plugin' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={})


@pytest.mark.parametrize("error", [ImportError("half an upgrade"), ValueError("no signature")])
def test_whatever_goes_wrong_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setenv(plugin_entry.TABLE_VARIABLE, "/some.tbl")
    monkeypatch.setattr(plugin, "register_hooks", fails)
    with pytest.raises(SystemExit, match=f"refuses to serve: {error}"):
        plugin_entry.register()
