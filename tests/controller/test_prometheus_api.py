"""Answers of the Prometheus API as readings, with the ages of their scrapes."""

import json
from typing import Any

import pytest

from sglang_alloc_controller.prometheus_api import parse_answer, parse_time, query
from sglang_alloc_controller.samples import SourceError
from sglang_alloc_controller.settings import SourceSettings

SETTINGS = SourceSettings(kind="prometheus", lookback_seconds=60.0)
# Our monotonic clock reads 500 when theirs reads 1,000,000.
OFFSET_SECONDS = 500.0 - 1_000_000.0


def _series(name: str, value: str, at: float = 999_999.0, **labels: str) -> dict[str, Any]:
    metric = {"__name__": f"sglang:{name}", "job": "sglang", "instance": "a:1", **labels}
    return {"metric": metric, "values": [[at - 5, "0"], [at, value]]}


def _histogram(name: str, counts: dict[str, int], **fields: Any) -> list[dict[str, Any]]:
    return [_series(f"{name}_bucket", str(n), le=edge, **fields) for edge, n in counts.items()]


def _gauges(queue: str = "3", running: str = "2", **fields: Any) -> list[dict[str, Any]]:
    named = {"num_queue_reqs": queue, "num_running_reqs": running}
    return [_series(name, value, **fields) for name, value in named.items()]


def _answer(series: list[dict[str, Any]]) -> str:
    return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": series}})


def test_the_last_scrape_of_each_series_counts_with_its_own_time() -> None:
    ttft = _histogram("time_to_first_token_seconds", {"0.5": 7, "+Inf": 9})
    reading = parse_answer(_answer(_gauges() + ttft), OFFSET_SECONDS, SETTINGS)
    assert reading.taken_at_seconds == 499.0
    assert (reading.queue_requests, reading.running_requests) == (3, 2)
    (histogram,) = reading.ttft.values()
    assert histogram.counts == (7.0, 9.0)


def test_replicas_stay_apart_and_the_late_one_decides_the_age() -> None:
    series = _gauges("3") + _gauges("8", instance="b:1", at=999_990.0)
    for instance in ("a:1", "b:1"):
        at = 999_999.0 if instance == "a:1" else 999_990.0
        series += _histogram(
            "time_to_first_token_seconds", {"0.5": 1, "+Inf": 2}, instance=instance, at=at
        )
    reading = parse_answer(_answer(series), OFFSET_SECONDS, SETTINGS)
    assert reading.queue_requests == 8
    assert len(reading.ttft) == 2
    assert reading.taken_at_seconds == 490.0


def _tokens(value: str, **labels: str) -> dict[str, Any]:
    return _series("realtime_tokens_total", value, mode="prefill_compute", **labels)


def test_prompt_tokens_of_replicas_add_up_as_their_requests_do() -> None:
    series = _gauges()
    for instance, answered, tokens in (("a:1", 2, "300"), ("b:1", 3, "500")):
        series += _histogram(
            "time_to_first_token_seconds", {"0.5": 1, "+Inf": answered}, instance=instance
        )
        series += [_tokens(tokens, instance=instance, tp_rank=rank) for rank in ("0", "1")]
    reading = parse_answer(_answer(series), OFFSET_SECONDS, SETTINGS)
    assert reading.event_count("ttft") == 5
    assert (reading.prefill_tokens, reading.engines) == (800.0, 2)


def test_another_node_of_the_same_server_is_no_replica() -> None:
    """It shows its ranks, which count the same prompts again, and answers no request."""
    series = _gauges() + _histogram("time_to_first_token_seconds", {"0.5": 1, "+Inf": 2})
    series += [_tokens("300", tp_rank="0"), _tokens("300", instance="b:1", tp_rank="8")]
    reading = parse_answer(_answer(series), OFFSET_SECONDS, SETTINGS)
    assert (reading.prefill_tokens, reading.engines) == (300.0, 1)


def test_a_replica_that_is_long_gone_neither_counts_nor_ages_the_reading() -> None:
    series = _gauges("3") + _gauges("8", instance="b:1", at=999_960.0)
    reading = parse_answer(_answer(series), OFFSET_SECONDS, SETTINGS)
    assert reading.queue_requests == 3
    assert reading.taken_at_seconds == 499.0


def test_series_that_the_last_scrape_no_longer_had_are_gone() -> None:
    old = _histogram("time_to_first_token_seconds", {"0.5": 7, "+Inf": 9}, at=999_994.0)
    reading = parse_answer(_answer(_gauges() + old), OFFSET_SECONDS, SETTINGS)
    assert reading.ttft == {}


def test_both_spellings_of_one_target_at_once_count_once() -> None:
    """While Prometheus is upgraded from 2 to 3, the lookback holds the series under both names."""
    ttft = _histogram("time_to_first_token_seconds", {"0.5": 7, "+Inf": 9})
    text = _answer(_gauges() + ttft)
    older = json.loads(text.replace("sglang:", "sglang_"))["data"]["result"]
    both = _answer(json.loads(text)["data"]["result"] + older)
    assert parse_answer(both, OFFSET_SECONDS, SETTINGS) == parse_answer(
        text, OFFSET_SECONDS, SETTINGS
    )


def test_underscores_in_the_names_read_the_same() -> None:
    text = _answer(_gauges())
    other = text.replace("sglang:", "sglang_")
    assert parse_answer(other, OFFSET_SECONDS, SETTINGS) == parse_answer(
        text, OFFSET_SECONDS, SETTINGS
    )


@pytest.mark.parametrize(
    "series",
    [[], _gauges(queue="NaN"), _gauges()[:1], _histogram("inter_token_latency_seconds", {"1": 1})],
)
def test_an_empty_a_missing_or_a_nan_series_is_no_reading(series: list[dict[str, Any]]) -> None:
    with pytest.raises(SourceError):
        parse_answer(_answer(series), OFFSET_SECONDS, SETTINGS)


def test_a_nan_count_is_no_reading() -> None:
    ttft = _histogram("time_to_first_token_seconds", {"0.5": 7, "+Inf": 9})
    ttft[0]["values"][-1][1] = "NaN"
    with pytest.raises(SourceError, match="finite counts"):
        parse_answer(_answer(_gauges() + ttft), OFFSET_SECONDS, SETTINGS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html></html>",
        "[]",
        '{"status": "success"}',
        '{"status": "success", "data": {"result": [{}]}}',
        '{"status": "success", "data": {"result": [{"metric": {"__name__": "x"}, "values": []}]}}',
    ],
)
def test_an_answer_of_another_shape_is_an_error(text: str) -> None:
    with pytest.raises(SourceError, match="Prometheus"):
        parse_answer(text, OFFSET_SECONDS, SETTINGS)


def test_a_failed_query_is_told() -> None:
    text = json.dumps({"status": "error", "error": "query timed out"})
    with pytest.raises(SourceError, match="query failed: query timed out"):
        parse_answer(text, OFFSET_SECONDS, SETTINGS)


def test_their_time_is_read() -> None:
    text = json.dumps({"status": "success", "data": {"result": [1000000.5, "1000000.5"]}})
    assert parse_time(text) == 1_000_000.5
    with pytest.raises(SourceError):
        parse_time(json.dumps({"status": "success", "data": {"result": []}}))


def test_the_query_selects_both_spellings_with_the_users_matchers() -> None:
    text = query(SourceSettings(kind="prometheus", selector='job="x"', lookback_seconds=15.0))
    assert text.startswith('{__name__=~"sglang[:_](num_queue_reqs|num_running_reqs|')
    assert text.endswith('",job="x"}[15000ms]')
