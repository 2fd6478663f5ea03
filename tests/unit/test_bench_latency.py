"""The latency bench: which budgets it times, and the figures that it makes of the timings."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from sglang_alloc.bench.latency import budget_cases
from sglang_alloc.bench.summary import Pair, markdown, quartiles, summarise, write_csv
from sglang_alloc.bench.timing import (
    ON_CPU,
    Prompts,
    measure_timings,
    require_room,
    tokenize,
    warm_up,
)
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.shared_table import TableShape
from sglang_alloc_controller.bench_csv import read_step_times


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


def test_without_stock_the_table_compares_with_full_budget() -> None:
    pairs = [
        Pair("full", 48, "decode", 8, None, 0.020),
        Pair("1/2", 24, "decode", 8, None, 0.015),
        Pair("full", 48, "prefill", 1, None, 0.4),
        Pair("1/2", 24, "prefill", 1, None, 0.3),
    ]
    text = markdown(summarise(pairs, {}))
    assert "stock" not in text
    assert "| 1/2 (budget 24) |  | 15.0 = 0.75x full |" in text


def test_the_controller_reads_a_csv_without_stock(tmp_path: Path) -> None:
    pairs = [
        Pair(name, budget, phase, batch, None, seconds * batch)
        for name, budget, seconds in (("full", 48, 0.4), ("1/2", 24, 0.3))
        for phase, batch in (("prefill", 2), ("decode", 8))
    ]
    path = tmp_path / "latency.csv"
    write_csv(path, summarise(pairs, {}), {"mode": "layer", "prefill_prompt_tokens": 100})
    with path.open(encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    empty = ("stock_median_ms", "ratio_to_stock", "ratio_low", "ratio_high")
    assert [row[name] for name in empty] == ["", "", "", ""]
    times = read_step_times(path)
    assert (times.prefill.sizes, times.decode.sizes) == ((200.0,), (8.0,))
    assert times.prefill.budgets == (24, 48)
    assert times.prefill.seconds[0] == pytest.approx((0.6, 0.8))


def _client(answer: Callable[[httpx2.Request], httpx2.Response]) -> httpx2.Client:
    return httpx2.Client(transport=httpx2.MockTransport(answer), base_url="http://server")


def _prompts(count: int = 1000) -> Prompts:
    return Prompts(range(count), random.Random(1))


def test_decode_is_the_difference_of_long_and_short_answers() -> None:
    now = [0.0]

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        tokens, prompts = body["sampling_params"]["max_new_tokens"], body["input_ids"]
        # 1 ms per prompt token, then 10 ms per further token and prompt.
        now[0] += 0.001 * sum(map(len, prompts)) + 0.010 * (tokens - 1) * len(prompts)
        meta = {"meta_info": {"completion_tokens": tokens}}
        return httpx2.Response(200, json=[meta for _ in prompts])

    sizes = ON_CPU._replace(prefill_batches=(2, 4), decode_batches=(1, 32), prompt_tokens=100)
    timings = measure_timings(_client(answer), sizes, _prompts(), clock=lambda: now[0])
    seconds = {timing[:2]: timing.seconds for timing in timings}
    assert seconds == {
        ("prefill", 2): pytest.approx(0.2),
        ("prefill", 4): pytest.approx(0.4),
        ("decode", 1): pytest.approx(0.010),
        ("decode", 32): pytest.approx(0.320),
    }


@pytest.mark.parametrize("disturbed", [1, 3, 100])
def test_a_step_that_took_no_time_is_measured_again_and_refused_at_last(disturbed: int) -> None:
    """The short answers of 8 requests take a second longer, so many times."""
    now, left, served = [0.0], [disturbed], list[tuple[int, int]]()

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        tokens, prompts = body["sampling_params"]["max_new_tokens"], body["input_ids"]
        served.append((len(prompts), tokens))
        now[0] += 0.5 + 0.010 * (tokens - 1) * len(prompts)
        if (len(prompts), tokens) == (8, 1) and left[0]:
            left[0] -= 1
            now[0] += 10.0
        meta = {"meta_info": {"completion_tokens": tokens}}
        return httpx2.Response(200, json=[meta for _ in prompts])

    sizes = ON_CPU._replace(prefill_batches=(1,), decode_batches=(8, 2), decode_steps=16)
    client = _client(answer)
    if disturbed == 100:
        with pytest.raises(ServerRunError, match=r"16 decode steps of 8.*5 times.*--decode-steps"):
            measure_timings(client, sizes, _prompts(), clock=lambda: now[0])
        return
    timings = measure_timings(client, sizes, _prompts(), clock=lambda: now[0])
    assert [timing[:2] for timing in timings] == [("prefill", 1), ("decode", 8), ("decode", 2)]
    assert [timing.seconds for timing in timings[1:]] == pytest.approx([0.080, 0.020])
    # Behind all sizes, so that two servers get the same prompts but for that.
    again = [(8, 1), (8, 17)] * disturbed
    assert served[2:] == [(8, 1), (8, 17), (2, 1), (2, 17), *again]


def test_warming_up_sends_every_size_once() -> None:
    batches = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        prompts, tokens = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        batches.append((len(prompts), len(prompts[0])))
        meta = {"meta_info": {"completion_tokens": tokens}}
        return httpx2.Response(200, json=[meta for _ in prompts])

    sizes = ON_CPU._replace(prefill_batches=(2,), decode_batches=(1, 8), prompt_tokens=100)
    warm_up(_client(answer), sizes, _prompts())
    assert set(batches) == {(2, 100), (1, 32), (8, 32)}


def test_prompts_longer_than_the_text_are_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigurationError, match=r"300 tokens.*only 200.*--text"):
        _prompts(200).cut(1, 300)


def test_texts_become_one_row_of_the_server_s_tokens() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        texts = json.loads(request.content)["prompt"]
        return httpx2.Response(200, json={"tokens": [[len(text), 7] for text in texts]})

    assert tokenize(_client(answer), ["ab", "abc"]) == [2, 7, 3, 7]


def test_a_batch_that_the_server_would_queue_is_refused() -> None:
    loads = {"loads": [{"max_running_requests": 31}, {"max_running_requests": 40}]}
    client = _client(lambda _: httpx2.Response(200, json=loads))
    with pytest.raises(ConfigurationError, match=r"32 requests.*runs 31.*--decode-batches"):
        require_room(client, ON_CPU)
    require_room(client, ON_CPU._replace(decode_batches=(31,), prefill_batches=(31,)))


@pytest.mark.parametrize("body", [{"loads": []}, {"loads": [{"max_running_requests": 0}]}, {}])
def test_a_server_that_names_no_limit_is_measured(body: dict[str, object]) -> None:
    require_room(_client(lambda _: httpx2.Response(200, json=body)), ON_CPU)


def test_a_short_answer_stops_the_bench() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json=[{"meta_info": {"completion_tokens": 1}}])

    with pytest.raises(ServerRunError, match="4 output tokens were asked for"):
        measure_timings(_client(answer), ON_CPU, _prompts())
