"""The latency bench: which budgets it times, and the figures that it makes of the timings."""

import csv
import json
import random
from pathlib import Path

import httpx2
import pytest

from sglang_alloc.bench.__main__ import main
from sglang_alloc.bench.latency import budget_cases
from sglang_alloc.bench.summary import Pair, markdown, quartiles, summarise, write_csv
from sglang_alloc.bench.timing import DECODE_STEPS, measure_timings
from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.shared_table import TableShape


def _make_pairs() -> list[Pair]:
    """Three rounds of one case: 20, 22 and 30 ms beside stock's 20, 20 and 40 ms."""
    timed = ((0.020, 0.020), (0.020, 0.022), (0.040, 0.030))
    decode = [Pair("1/2", 24, "decode", 8, stock, ours) for stock, ours in timed]
    return [*decode, Pair("1/2", 24, "prefill", 8, 0.4, 0.3)]


def test_cases_run_from_full_to_the_smallest_budget_of_the_table() -> None:
    cases = budget_cases(TableShape(6, 8, 32, budget_min=6, budget_max=48))
    assert cases == [
        ("full", 48),
        ("one below full", 47),
        ("5/6", 40),
        ("2/3", 32),
        ("1/2", 24),
        ("1/3", 16),
        ("minimum", 6),
    ]


def test_fractions_below_the_tables_smallest_budget_are_left_out() -> None:
    cases = budget_cases(TableShape(6, 8, 32, budget_min=24, budget_max=48))
    assert cases == [
        ("full", 48),
        ("one below full", 47),
        ("5/6", 40),
        ("2/3", 32),
        ("minimum", 24),
    ]


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    row = summarise(_make_pairs(), {("1/2", "decode"): 23.9})[0]
    assert (row.phase, row.case, row.budget, row.rounds) == ("decode", "1/2", 24, 3)
    assert row.median_ms == pytest.approx(22.0)
    assert row.stock_median_ms == pytest.approx(20.0)
    # 1.0, 1.1 and 0.75: the slow third round does not count against either.
    assert row.ratio_to_stock == pytest.approx(1.0)
    assert (row.ratio_low, row.ratio_high) == pytest.approx((0.875, 1.05))
    assert row.activations_per_token == 23.9


def test_quartiles_of_one_round_are_that_round() -> None:
    assert quartiles([3.0]) == (3.0, 3.0)


def test_the_csv_names_the_machine_on_every_row(tmp_path: Path) -> None:
    rows = summarise(_make_pairs(), {})
    path = tmp_path / "results" / "latency.csv"
    write_csv(path, rows, {"cpu_model": "A, processor", "cores": 2})
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["phase"] for line in lines] == ["decode", "prefill"]
    assert all(line["cpu_model"] == "A, processor" for line in lines)
    assert float(lines[0]["median_ms"]) == 22.0
    assert lines[0]["activations_per_token"] == ""


def test_the_table_has_a_line_per_budget_and_stock_above() -> None:
    text = markdown(summarise(_make_pairs(), {("1/2", "decode"): 23.9}))
    assert "| stock SGLang | | 20.0 |" in text
    assert "| 1/2 (budget 24) | 23.9 | 22.0 = 1.00x (0.88-1.05) |" in text
    assert "| prefill: ms until the batch's first tokens |" in text


def test_decode_is_the_difference_of_long_and_short_answers() -> None:
    now = [0.0]

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        tokens = body["sampling_params"]["max_new_tokens"]
        # 0.5 s of prefill for any batch, then 10 ms per further token and prompt.
        now[0] += 0.5 + 0.010 * (tokens - 1) * len(body["text"])
        meta = {"meta_info": {"completion_tokens": tokens}}
        return httpx2.Response(200, json=[meta for _ in body["text"]])

    client = httpx2.Client(transport=httpx2.MockTransport(answer), base_url="http://server")
    timings = measure_timings(client, ["text " * 200], random.Random(1), clock=lambda: now[0])
    seconds = {timing[:2]: timing.seconds for timing in timings}
    assert seconds["prefill", 8] == pytest.approx(0.5)
    assert seconds["decode", 1] == pytest.approx(0.010)
    assert seconds["decode", 32] == pytest.approx(0.320)
    assert DECODE_STEPS > 1


def test_a_short_answer_stops_the_bench() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json=[{"meta_info": {"completion_tokens": 1}}])

    client = httpx2.Client(transport=httpx2.MockTransport(answer), base_url="http://server")
    with pytest.raises(ServerRunError, match="4 output tokens were asked for"):
        measure_timings(client, ["text " * 200], random.Random(1))


def test_missing_tables_end_the_bench_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 500)
    arguments = ["latency", "--model", str(tmp_path), "--text", str(text), "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "budget table" in capsys.readouterr().err
