"""SGLang's metrics pages, recorded from a real server, as readings."""

import re
from pathlib import Path

import pytest

from sglang_alloc_controller.histogram_window import events_between, within_ratio
from sglang_alloc_controller.samples import Reading, SourceError
from sglang_alloc_controller.series_fold import unseen_priorities
from sglang_alloc_controller.settings import SourceSettings
from sglang_alloc_controller.sglang_metrics import missing_series, parse_metrics

ALL = SourceSettings(streaming_only=False)
COMPUTED = 'sglang:realtime_tokens_total{mode="prefill_compute",tp_rank="0"} 70\n'


def _parse(text: str, settings: SourceSettings | None = None) -> Reading:
    return parse_metrics(text, 7.0, settings or SourceSettings())


def test_a_burst_shows_its_queue(recorded: Path) -> None:
    reading = _parse((recorded / "burst.txt").read_text())
    assert reading.queue_requests == 20
    assert reading.running_requests == 1
    assert reading.taken_at_seconds == 7.0


def test_requests_that_do_not_stream_are_left_out_unless_asked_for(recorded: Path) -> None:
    text = (recorded / "after.txt").read_text()
    assert _parse(text).event_count("ttft") == 30
    assert _parse(text, ALL).event_count("ttft") == 32


def test_the_inter_token_histogram_has_no_streaming_label_and_is_counted_whole(
    recorded: Path,
) -> None:
    text = (recorded / "after.txt").read_text()
    assert _parse(text).itl == _parse(text, ALL).itl
    assert _parse(text).event_count("itl") > 0


def test_the_events_of_the_burst_lie_between_two_readings(recorded: Path) -> None:
    first, after = (_parse((recorded / f"{name}.txt").read_text()) for name in ("first", "after"))
    events = events_between(first.ttft, after.ttft)
    assert events is not None
    assert events.counts[-1] == 24
    within_a_second = within_ratio(events, 1.0)
    assert within_a_second is not None
    assert 0 < within_a_second < 0.5


def test_underscores_in_the_names_read_the_same(recorded: Path) -> None:
    text = (recorded / "after.txt").read_text()
    assert _parse(text.replace("sglang:", "sglang_")) == _parse(text)


def test_tensor_ranks_and_priorities_are_not_added_up(recorded: Path) -> None:
    # Both ranks say 3 under priority="" and again 3 under priority="3".
    reading = _parse((recorded / "tp2_priority_burst.txt").read_text())
    assert reading.queue_requests == 3
    assert reading.running_requests == 1


def test_histograms_of_all_priorities_count(recorded: Path) -> None:
    reading = _parse((recorded / "tp2_priority_after.txt").read_text())
    assert sorted(h.counts[-1] for h in reading.ttft.values()) == [6.0, 12.0]


def test_only_chosen_priorities_count_for_latency_and_queue(recorded: Path) -> None:
    after = (recorded / "tp2_priority_after.txt").read_text()
    burst = (recorded / "tp2_priority_burst.txt").read_text()
    chosen = SourceSettings(priorities=["3"])
    assert _parse(after, chosen).event_count("ttft") == 12
    assert _parse(after, chosen).event_count("itl") == 588
    assert _parse(burst, chosen).queue_requests == 3
    assert _parse(burst, SourceSettings(priorities=["0"])).queue_requests == 0
    both = SourceSettings(priorities=["0", "3"])
    assert _parse(burst, both).queue_requests == _parse(burst).queue_requests


def test_a_server_without_priorities_is_counted_whole(recorded: Path) -> None:
    chosen = SourceSettings(priorities=["0"])
    assert _parse((recorded / "burst.txt").read_text(), chosen).queue_requests == 20


@pytest.mark.parametrize(
    ("page", "priorities", "sentence"),
    [
        ("burst", ["0"], "server shows no priorities, so all"),
        ("tp2_priority_burst", ["7", "3"], r"chooses 7, which .* not shown yet; it shows"),
    ],
)
def test_a_chosen_priority_that_the_server_does_not_show_is_told(
    recorded: Path, page: str, priorities: list[str], sentence: str
) -> None:
    settings = SourceSettings(priorities=priorities)
    reading = _parse((recorded / f"{page}.txt").read_text(), settings)
    told = unseen_priorities(reading, settings)
    assert told is not None
    assert re.search(sentence, told)


@pytest.mark.parametrize(
    ("page", "priorities"),
    [("burst", None), ("tp2_priority_burst", ["3"]), ("start", ["0"])],
)
def test_nothing_is_told_of_priorities_that_are_there_or_of_a_fresh_server(
    recorded: Path, page: str, priorities: list[str] | None
) -> None:
    settings = SourceSettings(priorities=priorities)
    reading = _parse((recorded / f"{page}.txt").read_text(), settings)
    assert unseen_priorities(reading, settings) is None


def test_waiting_work_of_another_priority_does_not_make_the_server_idle(recorded: Path) -> None:
    burst = (recorded / "tp2_priority_burst.txt").read_text()
    assert _parse(burst, SourceSettings(priorities=["0"])).running_requests == 1


def test_a_line_that_comes_twice_counts_once(recorded: Path) -> None:
    text = (recorded / "after.txt").read_text()
    assert _parse(text + text) == _parse(text)


def test_the_busiest_rank_speaks_for_the_queue() -> None:
    text = "".join(
        f'sglang:num_{name}_reqs{{dp_rank="{rank}"}} {value}\n'
        for name, values in {"queue": (2, 9), "running": (4, 3)}.items()
        for rank, value in enumerate(values)
    )
    reading = _parse(text)
    assert (reading.queue_requests, reading.running_requests) == (9, 4)


def test_another_model_of_the_server_can_be_left_out(recorded: Path) -> None:
    text = (recorded / "after.txt").read_text()
    assert _parse(text, SourceSettings(model_name="tiny-moe")) == _parse(text)
    with pytest.raises(SourceError, match=r"source\.model_name"):
        _parse(text, SourceSettings(model_name="other"))


def test_edges_are_known_from_requests_that_do_not_stream_too(recorded: Path) -> None:
    reading = _parse((recorded / "start.txt").read_text())
    assert reading.ttft == {}
    assert 1.0 in reading.edges["ttft"]


def test_a_label_may_hold_braces_quotes_and_commas(recorded: Path) -> None:
    text = (recorded / "after.txt").read_text()
    odd = text.replace('model_name="tiny-moe"', r'model_name="a},le=\"9\" {b"')
    assert _parse(odd).event_count("ttft") == 30


def test_timestamps_and_exemplars_after_the_value_are_skipped() -> None:
    text = (
        "sglang_num_queue_reqs 3 1795573114680\n"
        'sglang_num_running_reqs{a="b"} 2.0 # {trace_id="x"} 0.5\n'
    )
    assert _parse(text).queue_requests == 3


@pytest.mark.parametrize(
    "text",
    ["", "<html>502 Bad Gateway</html>", "go_goroutines 7\n", "sglang:num_queue_reqs 3\n", "\x00"],
)
def test_a_page_that_is_not_sglangs_is_an_error(text: str) -> None:
    with pytest.raises(SourceError, match="--enable-metrics"):
        _parse(text)


def test_a_line_without_its_closing_brace_takes_nothing_from_the_next() -> None:
    """It was read on to the next brace, and a page without any was searched for minutes."""
    with pytest.raises(SourceError, match="hold no sglang:num_queue_reqs"):
        _parse('sglang:num_queue_reqs{a="b" 3\nsglang:num_running_reqs{a="b"} 2\n')
    broken = 'sglang:num_queue_reqs{a="b\n' * 50_000
    page = f'{broken}sglang:num_queue_reqs{{a="b"}} 3\nsglang:num_running_reqs{{a="b"}} 2\n'
    assert _parse(page).queue_requests == 3


def test_a_value_that_is_no_number_is_an_error(recorded: Path) -> None:
    text = (recorded / "after.txt").read_text()
    with pytest.raises(SourceError, match="'garbled' for sglang:num_queue_reqs"):
        _parse(text + "sglang:num_queue_reqs garbled\n")


def test_a_gauge_that_is_nan_counts_as_not_there() -> None:
    with pytest.raises(SourceError, match="num_queue_reqs"):
        _parse("sglang:num_queue_reqs NaN\nsglang:num_running_reqs 0\n")


def test_a_page_cut_off_in_a_histogram_is_an_error(recorded: Path) -> None:
    lines = (recorded / "after.txt").read_text().splitlines(keepends=True)
    cut = "".join(line for line in lines if 'le="+Inf"' not in line)
    with pytest.raises(SourceError, match=r"up to \+Inf belong"):
        _parse(cut)


def test_nothing_is_missing_from_a_server_that_has_answered(recorded: Path) -> None:
    assert missing_series((recorded / "after.txt").read_text() + COMPUTED) == []


def test_what_a_renamed_metric_leaves_missing_is_named(recorded: Path) -> None:
    text = (recorded / "after.txt").read_text() + COMPUTED
    assert missing_series(text.replace("num_queue_reqs", "num_waiting_reqs")) == [
        "sglang:num_queue_reqs"
    ]
    assert len(missing_series("")) == 7


def test_prompt_tokens_that_only_the_cache_gave_are_missing_computed_ones(recorded: Path) -> None:
    text = (recorded / "after.txt").read_text() + COMPUTED.replace("compute", "cache")
    assert missing_series(text) == ['sglang:realtime_tokens_total{mode="prefill_compute"}']


def test_before_the_first_answer_the_inter_token_histogram_is_missing(recorded: Path) -> None:
    missing = missing_series((recorded / "start.txt").read_text() + COMPUTED)
    assert missing == [
        "sglang:inter_token_latency_seconds_bucket",
        "sglang:inter_token_latency_seconds_sum",
    ]


def test_the_computed_prompt_tokens_are_those_of_the_rank_that_has_most(recorded: Path) -> None:
    text = (recorded / "after.txt").read_text()
    counters = "".join(
        f'sglang:realtime_tokens_total{{mode="{mode}",tp_rank="{rank}"}} {value}\n'
        for mode, rank, value in (
            ("prefill_compute", 0, 700.0),
            ("prefill_compute", 1, 900.0),
            ("prefill_cache", 0, 5000.0),
            ("decode", 0, 6000.0),
            ("prefill_compute", 2, "NaN"),
        )
    )
    assert _parse(_without_tokens(text) + counters).prefill_tokens == 900.0


def test_prompt_tokens_of_data_parallel_ranks_add_up_and_those_of_tensor_ranks_do_not(
    recorded: Path,
) -> None:
    """As SGLang labels them with `--tp-size 4 --dp-size 2 --enable-dp-attention`."""
    text = (recorded / "after.txt").read_text()
    counters = "".join(
        f'sglang:realtime_tokens_total{{dp_rank="{rank // 2}",mode="prefill_compute",'
        f'moe_ep_rank="{rank}",pp_rank="0",tp_rank="{rank}"}} {value}\n'
        for rank, value in enumerate((300.0, 300.0, 500.0, 490.0))
    )
    reading = _parse(_without_tokens(text) + counters)
    assert (reading.prefill_tokens, reading.engines) == (800.0, 2)


def test_prompt_tokens_count_from_the_first_answer_on(recorded: Path) -> None:
    gauges = "sglang:num_queue_reqs 0\nsglang:num_running_reqs 0\n"
    assert _parse(gauges + COMPUTED).prefill_tokens is None
    answered = _parse(_without_tokens((recorded / "start.txt").read_text()) + COMPUTED)
    assert (answered.prefill_tokens, answered.engines) == (70.0, 1)


def test_a_server_that_does_not_tell_its_prompt_tokens_reads_as_none(recorded: Path) -> None:
    assert _parse(_without_tokens((recorded / "after.txt").read_text())).prefill_tokens is None


def _without_tokens(text: str) -> str:
    return "".join(
        line for line in text.splitlines(keepends=True) if "realtime_tokens_total" not in line
    )
