"""The bench of budgeted routing, on shapes small enough for a CPU: rows, resuming, arithmetic."""

from __future__ import annotations

import csv
import json
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import launch_configs
from moe_bench import __main__ as bench_main
from moe_bench import engine, facts, latency, plan, server_bench
from moe_bench.budgets import FRACTIONS, MODES, Budget, budgets_of, make_rule
from moe_bench.dummy_models import (
    CONFIGS,
    even_tables,
    moe_layer_ids,
    threshold_tables,
    write_model,
)
from moe_bench.measure import (
    CHOSEN_ANEW,
    DROPPED,
    FUSED,
    Bench,
    _fused_routing,
    measure_layer,
    measure_routing,
    step_as_served,
)
from moe_bench.plan import Unit, gpu_units
from moe_bench.roofline import Ceilings, Work, bytes_moved, least_seconds, operations
from moe_bench.shapes import SHAPES, SMALL, make_experts, make_inputs
from moe_bench.timing import Timer
from sglang_alloc.compatibility_seams import DOWN_USES_TMA
from sglang_alloc.server_runs.server_process import CPU_ARGUMENTS, Server
from sglang_alloc.shared_table import SharedTable, publish_shared_table
from sglang_alloc.triton_experts import skip_dropped
from sglang_alloc_controller.bench_csv import read_step_times
from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors
from sglang_alloc_kernels.score_threshold import score_threshold_torch
from sglang_alloc_kernels.slot_rules import TWINS

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e9, flops_per_second=1e10)
BY_NAME = {shape.name: shape for shape in (*SHAPES, SMALL)}


@pytest.fixture(scope="module")
def sglang() -> Iterator[None]:
    """SGLang, whose import warns of what a CPU lacks; one thread, which waits for no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sglang.srt.layers.moe.topk
        import sglang.srt.server_args  # noqa: F401
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench() -> Bench:
    return Bench(CPU, Timer(CPU, repeats=1, window_seconds=1e-6), CEILINGS)


def _slots(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = make_inputs(SMALL, tokens, CPU, torch.float32, seed)
    return inputs.router_logits.softmax(dim=1).topk(SMALL.top_k)


@pytest.mark.usefixtures("sglang")
@pytest.mark.filterwarnings("ignore")
def test_a_layer_s_rows_hold_every_mode_at_every_budget_and_what_was_counted(bench: Bench) -> None:
    stock, *rows = list(measure_layer(bench, SMALL, 8))
    dropped = [row for row in rows if row.variant == DROPPED]
    assert [(row.mode, row.budget) for row in dropped] == [
        (mode, budget) for mode in MODES for budget in budgets_of(mode)
    ]
    fused = [row for row in rows if row.variant == FUSED]
    assert [(row.mode, row.budget) for row in fused] == [(row.mode, row.budget) for row in dropped]
    assert len(rows) == len(dropped) + len(fused)
    assert stock.variant == "stock"
    assert stock.activations_per_token == SMALL.top_k
    for row in rows:
        assert row.median_us > 0
        assert row.speedup == pytest.approx(stock.median_us / row.median_us)
        assert row.share_of_roofline == pytest.approx(row.speedup / row.roofline_speedup)
    half = {row.mode: row for row in dropped if row.budget == "1/2"}
    for mode in ("layer", "threshold", "token"):
        assert half[mode].activations_per_token == 2.0
    assert half["union"].distinct_experts == half["layer"].distinct_experts
    assert half["union"].activations_per_token > 2.0
    best, capped = (
        next(row for row in dropped if row.budget == name) for name in ("top-1", "top-1, cap 3/4")
    )
    assert best.distinct_experts < capped.distinct_experts <= 0.75 * SMALL.num_experts


@pytest.mark.usefixtures("sglang")
@pytest.mark.filterwarnings("ignore")
def test_routing_is_timed_stock_dropped_counted_and_fused(bench: Bench) -> None:
    rows = list(measure_routing(bench, SMALL, 3))
    found = Counter(row.variant for row in rows)
    statistics = "statistics of a step, once for all layers"
    assert found == {
        "stock": 1,
        "stock, drop": 4,
        "stock, drop, sums": 4,
        "fused": 4,
        "fused, sums": 4,
        CHOSEN_ANEW: 1,
        statistics: 1,
    }


@pytest.mark.parametrize("mode", MODES)
def test_fused_routing_is_timed_on_the_calls_that_a_server_makes(mode: str, bench: Bench) -> None:
    inputs = make_inputs(SMALL, 8, CPU, torch.float32)
    slots = inputs.router_logits.softmax(dim=1).topk(SMALL.top_k)
    step = step_as_served(SMALL, 8, CPU, counted=False)
    rule = make_rule(SMALL, mode, Budget(0.5), slots, TWINS)
    _, ids = _fused_routing(bench, SMALL, inputs, mode, rule, step)()
    every = LayerRows(torch.full((1,), float(SMALL.top_k)))
    routed = TWINS.routing(inputs.router_logits, SMALL.router, every, 0, "all")
    assert torch.equal(ids, rule.drop(*routed, step)[1])
    assert int((ids < 0).sum()) > 0


@pytest.mark.parametrize(("tokens", "reachable"), [(4, True), (64, False)])
def test_union_opens_by_the_threshold_with_which_half_of_all_slots_stay(
    tokens: int, reachable: bool
) -> None:
    """Riders included; in a large batch even each token's best slot alone keeps more."""
    slots = _slots(tokens)
    half, best = (
        make_rule(SMALL, "union", budgets_of("union")[name], slots, TWINS)
        for name in ("1/2 kept", "top-1")
    )
    kept, least = (int((rule.drop(*slots, StepTensors())[1] >= 0).sum()) for rule in (half, best))
    assert (kept <= 2 * tokens) == reachable
    if not reachable:
        assert kept == least
        return
    below = slots[0][slots[0] < half.rows.limits].max()
    lower = LayerRows(below[None])
    more = TWINS.union(*slots, lower, 0, SMALL.num_experts, "threshold")[1] >= 0
    assert int(more.sum()) > 2 * tokens >= kept > least


@pytest.mark.parametrize("mode", ["layer", "threshold", "token"])
@pytest.mark.parametrize(("budget", "expected"), [("full", 4.0), ("1/2", 2.0)])
def test_a_rule_keeps_the_share_that_it_is_made_for(
    mode: str, budget: str, expected: float
) -> None:
    slots = _slots(64)
    rule = make_rule(SMALL, mode, Budget(FRACTIONS[budget]), slots, TWINS)
    kept = rule.drop(*slots, StepTensors())[1] >= 0
    assert float(kept.sum()) / len(kept) == pytest.approx(expected, rel=0.02)


def test_the_experts_are_called_as_the_plugin_has_them_called_and_stock_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(engine, "installed_version", lambda: "0.5.22")
    call = engine.AsHooked(lambda *args, **kwargs: seen.append((args, kwargs)))  # type: ignore[arg-type, func-returns-value]
    given = (*range(DOWN_USES_TMA), True, "more")
    for filter_expert in (False, True):
        call(*given, filter_expert=filter_expert, inplace=True)
    served = skip_dropped(given, {"inplace": True}, "0.5.22")
    assert seen == [(given, {"filter_expert": False, "inplace": True}), served]
    assert served[0][DOWN_USES_TMA] is False


@pytest.mark.usefixtures("sglang")
@pytest.mark.filterwarnings("ignore")
def test_the_bench_puts_its_call_where_sglang_looks_it_up_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    monkeypatch.setattr(fused_moe, engine.SEQUENCE, original := getattr(fused_moe, engine.SEQUENCE))
    for _ in range(2):
        engine.triton_experts(make_experts(SMALL, CPU, torch.float32))
    assert getattr(fused_moe, engine.SEQUENCE) == engine.AsHooked(original)
    names = fused_moe.fused_experts_impl.__code__.co_names
    assert engine.SEQUENCE in names


@pytest.mark.usefixtures("sglang")
@pytest.mark.filterwarnings("ignore")
def test_sglang_takes_the_gpu_bench_s_arguments_and_captures_every_concurrency() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = ArgumentParser()
    ServerArgs.add_cli_args(parser)
    plan = server_bench.ON_GPU
    given = [*CPU_ARGUMENTS, *plan.server_arguments()]
    parsed = parser.parse_args(["--model-path", "x", *given])
    assert parsed.device == "cuda"
    assert parsed.attention_backend == "triton"
    assert parsed.cuda_graph_bs_decode == sorted(plan.concurrencies)
    assert parsed.max_running_requests == max(plan.concurrencies)
    assert parsed.cuda_graph_bs_prefill == sorted(plan.prefill_tokens)
    assert parsed.chunked_prefill_size == max(plan.prefill_tokens)


def test_bytes_and_operations_by_hand() -> None:
    work = Work(num_tokens=2, activations=5, distinct_experts=3)
    expert = 3 * 64 * 32 * 2
    assert bytes_moved(SMALL, work) == 3 * expert + 2 * 2 * 64 * 2
    assert operations(SMALL, work) == 5 * 6 * 64 * 32
    assert least_seconds(SMALL, work, CEILINGS) == bytes_moved(SMALL, work) / 1e9
    slow = Ceilings(bytes_per_second=1e12, flops_per_second=1e6)
    assert least_seconds(SMALL, work, slow) == operations(SMALL, work) / 1e6


def test_half_of_all_experts_of_deepseek_v2_lite_halve_the_bytes_of_decode() -> None:
    """At batch 8 experts dominate: 17.3 MB each against 64 kB of hidden states."""
    shape = BY_NAME["DeepSeek-V2-Lite"]
    assert shape.expert_bytes == 3 * 2048 * 1408 * 2
    full, half = (bytes_moved(shape, Work(8, 48 * n // 36, n)) for n in (36, 18))
    assert full / half == pytest.approx(2.0, rel=1e-3)


def _run(folder: Path, *arguments: str) -> int:
    return bench_main.main(["--device", "cpu", "--out", str(folder), *arguments])


@pytest.mark.usefixtures("sglang")
@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_where_the_last_one_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [Unit("routing", SMALL, 1), Unit("layer", SMALL, 2)]
    monkeypatch.setattr(bench_main, "cpu_units", lambda: units)
    quick = {"repeats": 1, "window_seconds": 1e-6}
    monkeypatch.setattr(bench_main, "Timer", lambda device, **_: Timer(device, **quick))
    monkeypatch.setattr(facts, "source_commit", lambda: "abc")
    assert _run(tmp_path, "--minutes", "-1") == bench_main.DONE
    assert not (tmp_path / "moe-cpu.csv").exists()
    monkeypatch.setattr(bench_main, "cpu_units", lambda: units[:1])
    assert _run(tmp_path) == bench_main.DONE
    first = (tmp_path / "moe-cpu.csv").read_text()
    monkeypatch.setattr(bench_main, "cpu_units", lambda: units)
    assert _run(tmp_path) == bench_main.DONE
    second = (tmp_path / "moe-cpu.csv").read_text()
    assert second.startswith(first)
    assert _run(tmp_path) == bench_main.DONE
    assert (tmp_path / "moe-cpu.csv").read_text() == second
    rows = list(csv.DictReader(second.splitlines()))
    assert {row["kind"] for row in rows} == {"routing", "layer"}
    assert {row["commit"] for row in rows} == {"abc"}
    assert all(row["device"] and row["torch"] and row["copy_gb_per_second"] for row in rows)
    monkeypatch.setattr(facts, "source_commit", lambda: "def")
    assert _run(tmp_path) == bench_main.DONE  # another commit is measured anew
    assert (tmp_path / "moe-cpu.csv").read_text().count("\n") == 2 * second.count("\n") - 1


def test_without_a_gpu_the_bench_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(facts, "driver_version", lambda: "-")
    monkeypatch.setattr(facts, "version_of", lambda name: "-" if name == "sglang-alloc" else "1")
    assert bench_main.main(["--device", "cuda"]) == bench_main.FAILED
    said = " ".join(capsys.readouterr().err.split())
    assert "pip install --no-deps ." in said
    assert bench_main.main(["--device", "cuda", "--kinds", "layer"]) == bench_main.FAILED
    said = " ".join(capsys.readouterr().err.split())
    assert "pip install" not in said
    assert "an NVIDIA GPU with its driver" in said
    assert "a CUDA build of torch" in said
    assert "offline_bundle.py" in said


def test_the_plan_covers_the_issue_s_batches_and_prefills() -> None:
    units = gpu_units(plan.KINDS, tuple(shape.name for shape in SHAPES))
    sizes = {(unit.kind, unit.num_tokens) for unit in units}
    assert {("layer", 1), ("layer", 8), ("layer", 64), ("layer", 512)} <= sizes
    assert {("prefill", 1024), ("prefill", 16384), ("server", 0)} <= sizes
    assert len({unit.name for unit in units}) == len(units)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dummy_model_has_the_bench_s_shape_and_a_table_that_fits(
    name: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / name, name)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    shape = BY_NAME[name]
    assert config["hidden_size"] == shape.hidden_size
    assert config["moe_intermediate_size"] == shape.intermediate_size
    assert config["num_experts_per_tok"] == shape.top_k
    tables = even_tables(folder)
    tables.validate()
    assert tables.num_experts == shape.num_experts
    assert len(tables.layer_ids) == len(moe_layer_ids(config))
    spread = tables.quotas.max(axis=1) - tables.quotas.min(axis=1)
    assert spread.max() <= 1


@pytest.mark.parametrize("name", CONFIGS)
def test_thresholds_keep_their_quotas_where_a_router_scores_all_experts_alike(
    name: str, tmp_path: Path
) -> None:
    """As dummy weights make it: weights of a slot that differ in the fifth digit."""
    tables = threshold_tables(write_model(tmp_path / name, name))
    tables.validate()
    assert tables.thresholds is not None
    assert tables.saliency is not None
    shape, rows = BY_NAME[name], len(tables.budgets)
    generator = torch.Generator().manual_seed(0)
    logits = 1e-5 * torch.randn(4000, shape.num_experts, generator=generator)
    weights, ids = logits.softmax(dim=1).topk(shape.top_k)
    if shape.router.renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    for row in (0, rows // 3, rows // 2, rows - 1):
        thresholds = torch.from_numpy(tables.thresholds[row])
        saliency = torch.from_numpy(tables.saliency)
        kept = [
            score_threshold_torch(weights * saliency[layer][ids], thresholds[layer]).sum()
            for layer in range(tables.num_layers)
        ]
        assert float(sum(kept)) / 4000 == pytest.approx(float(tables.budgets[row]), rel=0.06)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.5])
def test_the_row_is_taken_that_really_keeps_what_was_asked_for(
    bias: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose routing keeps more or less than its rows were made for."""
    publish_shared_table(tmp_path / "t.tbl", threshold_tables(write_model(tmp_path / "m", "small")))
    counted = {"tokens": 0, "activations": 0}
    in_force: list[int] = []

    with SharedTable.open(tmp_path / "t.tbl") as opened:
        shape_of_table = opened.shape

    class Table:
        """The shared table, with counters as a worker would move them."""

        shape = shape_of_table

        def worker_counters(self) -> list[SimpleNamespace]:
            names = {f"sampled_decode_{name}": value for name, value in counted.items()}
            return [SimpleNamespace(**names, sampled_decode_steps=0, distinct_experts=0)]

    def generate(*_: Any) -> float:
        kept = min(max(0.8 * in_force[-1] + bias, 2.0), 8.0)
        counted["tokens"] += 1000
        counted["activations"] += round(1000 * kept)
        return 0.0

    monkeypatch.setattr(
        server_bench,
        "BudgetOverride",
        lambda _: SimpleNamespace(set=lambda p, d: in_force.append(d)),
    )
    monkeypatch.setattr(server_bench, "generate", generate)
    monkeypatch.setattr(server_bench, "settle", lambda *_: None)
    server = Server("http://127.0.0.1:1", None, None)  # type: ignore[arg-type]
    found = server_bench.fit_thresholds(server, Table(), 4)  # type: ignore[arg-type]
    best = min(range(2, 8), key=lambda budget: abs(0.8 * budget + bias - 4.0))
    assert found == best


_SERVED = {
    "kind": "server decode",
    "shape": "small",
    "num_tokens": "8",
    "mode": "layer",
    "budget": "1/2",
    "median_us": "600.0",
    "stock_us": "800.0",
}


def test_served_rows_become_step_times_that_the_controller_reads(tmp_path: Path) -> None:
    rows = [
        _SERVED | {"kind": f"server {phase}", "budget": budget, "median_us": us, "mode": mode}
        for phase in ("decode", "prefill")
        for mode, budget, us in (
            ("layer", "full", "800.0"),
            ("layer", "1/2", "600.0"),
            ("layer", "top-1", "500.0"),
            ("layer+fused", "full", "700.0"),
            ("-", "full", "800.0"),
        )
    ]
    source, target = tmp_path / "moe-cuda.csv", tmp_path / "latency.csv"
    with source.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert latency.main([str(source), str(target), "--shape", "small"]) == 0
    times = read_step_times(target, "layer")
    assert times.decode.budgets == (2, 4, 8)
    assert times.decode.seconds == (pytest.approx((5e-4, 6e-4, 8e-4)),)
    assert latency.main([str(source), str(target), "--shape", "small", "--mode", "token"]) == 1


def test_launches_of_the_experts_fit_a_gpu_and_the_best_of_both_budgets_is_chosen() -> None:
    configs = launch_configs.candidates()
    assert configs[0] == launch_configs.DEFAULT
    assert len({json.dumps(config) for config in configs}) == len(configs) > 20
    for config in configs[1:]:
        width = config["BLOCK_SIZE_M"] + config["BLOCK_SIZE_N"]
        used = 2 * config["num_stages"] * config["BLOCK_SIZE_K"] * width
        assert used <= launch_configs.SHARED_MEMORY_BYTES
    timed = [
        {"num_tokens": 8, "budget": budget, "config": index, "us": us}
        for budget, times in (("full", (100, 90, 95)), ("1/2", (60, 70, 55)))
        for index, us in enumerate(times)
    ]
    assert launch_configs.best_configs(timed, configs[:3]) == {8: configs[2]}
