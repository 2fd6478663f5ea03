"""The check of the simulator against a server: bench, twin, arithmetic and files."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import httpx2
import pytest
from demo_runs import make_record, make_run

from sglang_alloc.bench.simulator_check.__main__ import main
from sglang_alloc.bench.simulator_check.compare import compare_folder, simulate_all
from sglang_alloc.bench.simulator_check.errors import WHOLE, Error, compare, waiting_at
from sglang_alloc.bench.simulator_check.felt import (
    AHEAD,
    BY_LATENCIES,
    BudgetsFrom,
    Computed,
    Felt,
    Request,
    Run,
    Served,
)
from sglang_alloc.bench.simulator_check.files import read_served, write_served
from sglang_alloc.bench.simulator_check.fit import Case, StepBench, write_bench
from sglang_alloc.bench.simulator_check.serve import run_of
from sglang_alloc.bench.simulator_check.service import (
    durations,
    fitted_times,
    write_times,
)
from sglang_alloc.demo.controller_process import controller_settings
from sglang_alloc.demo.load_plan import Slo
from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.server_runs.reference_files import MODEL
from sglang_alloc.server_runs.served_steps import Step, read_steps
from sglang_alloc.shared_table import Selection
from sglang_alloc.step_record import StepRecord
from sglang_alloc_controller.bench_csv import read_step_times

TABLES = MODEL / "budget_tables.npz"
FULL, FLOOR = 40, 13


def _make_run(name: str = "full", ttft: float = 0.2, budget: int = FULL, **fields: Any) -> Run:
    felt = tuple(Felt(ttft * (1 + index % 2), 0.02) for index in range(4))
    budgets, computed = (BudgetsFrom(0.0, *[budget] * 4),), Computed(float(budget), 0.0)
    return Run(name, felt, ((0.0, 0.0), (1.0, 4.0)), budgets, computed, computed)._replace(**fields)


def _make_served(*runs: Run, apart_seconds: float = 5.0) -> Served:
    by_latencies = controller_settings(
        table=Path("t.tbl"),
        server_url="http://127.0.0.1:1",
        slo=Slo(0.5, 0.05),
        floor_budget=FLOOR,
        decision_log=Path("d.jsonl"),
        port=9464,
    )
    quality = {**by_latencies["quality"], "cost_model": "bench.csv"}
    settings = {BY_LATENCIES: by_latencies, AHEAD: {**by_latencies, "quality": quality}}
    requests = tuple(
        Request("calm" if index < 2 else "busy", apart_seconds * index, 896, 3)
        for index in range(4)
    )
    phases = (("calm", 0.0, 10.0), ("busy", 10.0, 20.0))
    return Served({"cores": 2}, requests, phases, settings, 8, 2048, runs or (_make_run(),))


def _by_name(errors: list[Error], phase: str = WHOLE) -> dict[str, Error]:
    return {error.measure: error for error in errors if error.phase == phase}


def _write_bench(path: Path) -> Path:
    """Prefill 100 ms a prompt, 180 ms two; decode 20 ms and 2 ms a request; half of it at 13."""
    seconds = {}
    for budget, factor in ((FULL, 1.0), (FLOOR, 0.5)):
        seconds[Case("prefill", 1, budget)] = [0.100 * factor]
        seconds[Case("prefill", 2, budget)] = [0.180 * factor]
        for batch in (1, 8):
            seconds[Case("decode", batch, budget)] = [(0.020 + 0.002 * batch) * factor]
    write_bench(path, seconds, 896, {"cores": 2})
    return path


def test_a_served_run_has_the_budgets_of_both_kinds_of_steps_and_what_tokens_got() -> None:
    steps = (
        Step(0.1, "prefill", 40, 100, is_calm=True),
        Step(0.2, "prefill", 20, 300),
        Step(0.3, "decode", 30, 2, is_calm=True),
    )
    record = make_run(
        make_record(0, due=0.0, ttft=0.5, gaps=(0.05, 0.15)),
        make_record(1, due=1.0, ttft=None),
        budgets=((0.0, 40, 40), (2.0, 20, 40), (4.0, 20, 30)),
        calm_budgets=((0.0, 40, 40), (4.0, 30, 40)),
        steps=steps,
    )
    run = run_of("one", record)
    assert run.felt[0] == Felt(0.5, pytest.approx(0.1))
    assert all(math.isnan(one) for one in run.felt[1])
    assert run.budgets[:3] == (
        BudgetsFrom(0.0, 40, 40, 40, 40),
        BudgetsFrom(2.0, 20, 40, 40, 40),
        BudgetsFrom(4.0, 20, 30, 30, 40),
    )
    assert run.prefill == Computed(pytest.approx((4000 + 6000) / 400), pytest.approx(0.25))
    assert run.decode == Computed(30.0, 1.0)


def test_errors_are_simulated_over_served_by_phase_and_in_whole() -> None:
    served, model = _make_run(ttft=0.2), _make_run(ttft=0.25)
    found = compare(_make_served(), served, model)
    whole = _by_name(found)
    assert whole["ttft_p50_seconds"].served == pytest.approx(0.2)
    assert whole["ttft_p95_seconds"].simulated == pytest.approx(0.5)
    assert whole["ttft_p95_seconds"].error_ratio == pytest.approx(0.25)
    assert whole["itl_p50_seconds"].error_ratio == 0.0
    assert whole["ttft_p50_seconds"].requests == 4
    assert _by_name(found, "busy")["ttft_p50_seconds"].requests == 2


def test_a_queue_that_was_empty_has_a_difference_and_no_ratio() -> None:
    served = _make_run(queue=((0.0, 0.0), (1.0, 0.0)))
    error = _by_name(compare(_make_served(), served, _make_run()))["queue_mean_requests"]
    assert error.difference == pytest.approx(2.0)
    assert math.isnan(error.error_ratio)


def test_what_waited_after_the_traces_end_does_not_count() -> None:
    late = _make_run(queue=((0.0, 1.0), (25.0, 100.0)))
    error = _by_name(compare(_make_served(), late, late))["queue_mean_requests"]
    assert error.served == 1.0


def test_requests_that_are_due_and_have_no_first_token_are_counted_each_second() -> None:
    # Due at 0, 5, 10 and 15 s; the second and the fourth wait for 4 s, the others for 2 s.
    slow = _make_run(ttft=2.0)
    assert [waiting_at(_make_served(), slow, second) for second in (0, 2, 8, 9, 18)] == [
        1,
        0,
        1,
        0,
        1,
    ]
    whole = _by_name(compare(_make_served(), slow, _make_run(ttft=0.2)))
    assert whole["unanswered_mean_requests"].served == pytest.approx(12 / 20)
    assert whole["unanswered_mean_requests"].simulated == pytest.approx(4 / 20)


def test_budgets_and_calm_steps_are_compared_by_the_tokens_computed() -> None:
    run = _make_run(prefill=Computed(35.0, 0.9), decode=Computed(39.0, math.nan))
    twin = _make_run(prefill=Computed(28.0, 0.6), decode=Computed(40.0, 1.0))
    whole = _by_name(compare(_make_served(), run, twin))
    budget = whole["prefill_budget_mean_activations"]
    assert (budget.served, budget.error_ratio) == (35.0, pytest.approx(-0.2))
    assert whole["prefill_calm_tokens_ratio"].difference == pytest.approx(-0.3)
    assert whole["decode_budget_mean_activations"].difference == pytest.approx(1.0)
    assert math.isnan(whole["decode_calm_tokens_ratio"].served)


def test_an_unanswered_request_is_left_out_of_the_percentiles() -> None:
    felt = (*_make_run().felt[:3], Felt(math.nan, math.nan))
    error = _by_name(compare(_make_served(), _make_run(felt=felt), _make_run()))
    assert error["ttft_p95_seconds"].served == pytest.approx(0.4)


def test_runs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="argument"):
        compare(_make_served(), _make_run(), _make_run(felt=(Felt(1.0, 1.0),)))


def test_a_measurement_comes_back_from_its_file(tmp_path: Path) -> None:
    felt = (*_make_run().felt[:3], Felt(math.nan, 0.5))
    served = _make_served(_make_run(felt=felt, decode=Computed(40.0, math.nan)))
    write_served(tmp_path / "served.json", served)
    found = read_served(tmp_path / "served.json")
    assert found._replace(runs=()) == served._replace(runs=())
    assert math.isnan(found.runs[0].felt[3].ttft_seconds)
    assert found.runs[0].felt[:3] == served.runs[0].felt[:3]
    assert (found.runs[0].budgets, found.runs[0].prefill) == (
        served.runs[0].budgets,
        served.runs[0].prefill,
    )
    assert found.runs[0].decode.mean_budget == 40.0
    assert math.isnan(found.runs[0].decode.calm_ratio)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "served.json").write_text("[]")
    with pytest.raises(ServerRunError, match="simulator_check measure"):
        read_served(tmp_path / "served.json")


def test_the_bench_times_a_step_as_the_difference_of_long_and_short_answers() -> None:
    now = [0.0]

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        tokens, prompts = body["sampling_params"]["max_new_tokens"], body["text"]
        now[0] += 0.1 * len(prompts) + (tokens - 1) * (0.02 + 0.001 * len(prompts))
        return httpx2.Response(
            200, json=[{"meta_info": {"completion_tokens": tokens}}] * len(prompts)
        )

    class Override:
        def set(self, prefill_budget: int, decode_budget: int) -> None:
            assert prefill_budget == decode_budget

    client = httpx2.Client(transport=httpx2.MockTransport(answer), base_url="http://server")
    override: Any = Override()
    bench = StepBench(client, override, ["text " * 200], 100, clock=lambda: now[0])
    bench.run_round([FULL, FLOOR], seed=1)
    assert bench.seconds[Case("prefill", 2, FULL)] == [pytest.approx(0.2)]
    assert bench.seconds[Case("decode", 8, FLOOR)] == [pytest.approx(0.028)]


def test_the_bench_is_one_that_the_simulator_fits_a_plant_to(tmp_path: Path) -> None:
    times = read_step_times(_write_bench(tmp_path / "bench.csv"))
    assert times.prefill.sizes == (896.0, 1792.0)
    assert times.prefill.at(896, FULL) == pytest.approx(0.100)
    assert times.decode.at(8, FLOOR) == pytest.approx(0.018)


def test_steps_in_service_last_until_the_next_begins_unless_the_server_may_have_been_idle(
    tmp_path: Path,
) -> None:
    record = StepRecord(tmp_path, 0)
    begins = ((0.0, "prefill", 896), (0.1, "decode", 1), (0.12, "decode", 1), (5.0, "prefill", 896))
    for number, (second, phase, tokens) in enumerate(begins):
        selection = Selection("override", 1, FULL, FLOOR)
        record.add(number, selection, phase, tokens, int(second * 1e9))
    record.close()
    steps = read_steps(tmp_path / "rank0.csv")
    assert [(step.phase, step.budget) for step in steps[:2]] == [("prefill", 40), ("decode", 13)]
    assert [seconds for _, seconds in durations(steps)] == pytest.approx([0.1, 0.02])


def test_a_plant_fitted_in_service_has_the_lines_of_its_steps(tmp_path: Path) -> None:
    steps, second = [], 0.0
    for tokens in (256, 896, 1792):
        steps.append(Step(second, "prefill", FULL, tokens))
        second += 0.01 + tokens / 10_000
    for batch in (1, 2, 4, 8, 8):
        steps.append(Step(second, "decode", FULL, batch))
        second += 0.02 + 0.003 * batch
    write_times(tmp_path / "service.csv", fitted_times(steps, [FULL]))
    times = read_step_times(tmp_path / "service.csv")
    assert times.prefill.at(1000, FULL) == pytest.approx(0.11)
    assert times.decode.at(4, FULL) == pytest.approx(0.032)
    with pytest.raises(ValueError, match="budget 13"):
        fitted_times(steps, [FLOOR])


def test_the_twin_takes_as_long_as_the_bench_says(tmp_path: Path) -> None:
    runs = (_make_run("full"), _make_run("reduced", budget=FLOOR))
    bench = _write_bench(tmp_path / "bench.csv")
    full, reduced = simulate_all(_make_served(*runs), TABLES, bench)
    assert full.felt[0] == pytest.approx((0.100, 0.022))
    assert reduced.felt[0] == pytest.approx((0.050, 0.011))
    assert reduced.budgets[-1][1:] == (FLOOR,) * 4
    assert (reduced.prefill, reduced.decode) == (Computed(FLOOR, 1.0), Computed(FLOOR, 1.0))


@pytest.mark.parametrize("name", [BY_LATENCIES, AHEAD])
def test_the_controlled_twin_is_run_by_the_controllers_own_law(name: str, tmp_path: Path) -> None:
    # Ten requests a second are too many at 40: the law has to go down, and no lower than 13.
    served = _make_served(_make_run(name), apart_seconds=0.1)
    requests = tuple(Request("busy", 0.1 * index, 896, 3) for index in range(600))
    phases = (("busy", 0.0, 60.0),)
    served = served._replace(requests=requests, phases=phases)
    (twin,) = simulate_all(served, TABLES, _write_bench(tmp_path / "b"))
    lowest = min(one.prefill_budget for one in twin.budgets)
    assert FLOOR <= lowest < FULL
    assert len(twin.felt) == 600
    assert FLOOR <= lowest < twin.prefill.mean_budget < FULL
    assert 0 < twin.decode.calm_ratio < 1
    assert any(one.calm_prefill_budget > one.prefill_budget for one in twin.budgets)


def test_the_command_compares_what_lies_in_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_served(tmp_path / "served.json", _make_served(_make_run(), _make_run(AHEAD)))
    for name in ("bench", "service"):
        _write_bench(tmp_path / f"{name}.csv")
    assert main(["compare", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| ttft_p50_seconds | 0.2 | 0.1 | -50% |") == 2
    with (tmp_path / "errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"full", AHEAD}
    assert float(rows[0]["error_ratio"]) == -0.5
    assert {row["plant"] for row in rows} == {"bench", "service"}
    assert (tmp_path / "runs-service.png").stat().st_size > 10_000


def test_a_folder_without_a_measurement_ends_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--out", str(tmp_path)]) == 1
    assert "served.json" in capsys.readouterr().err
    with pytest.raises(ServerRunError):
        compare_folder(tmp_path, TABLES)
