"""Whatever bytes a server sends, a reading fails with one sentence and nothing else."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loads_answers import answer, rank

from sglang_alloc_controller.prometheus_api import parse_answer, parse_time
from sglang_alloc_controller.reading_json import reading_to_json
from sglang_alloc_controller.samples import Reading, SourceError
from sglang_alloc_controller.settings import SourceSettings
from sglang_alloc_controller.sglang_loads import parse_loads
from sglang_alloc_controller.sglang_metrics import parse_metrics

PROMETHEUS = SourceSettings(kind="prometheus", model_name="tiny-moe", priorities=["0"])
PAGE = (Path(__file__).parent / "recorded" / "tp2_priority_burst.txt").read_text()
LOADS = answer(rank(0, num_waiting_reqs=3), rank(1, decode_moments=[1, 2, 3, 4, 5, 6]))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
_SAMPLES = st.lists(st.lists(_JSON, max_size=3), max_size=3)
_LABELS = st.dictionaries(
    st.sampled_from(["le", "job", "instance", "model_name", "priority", "is_streaming"]), _JSON
)


def _tried(parse: Any, *arguments: Any) -> None:
    with suppress(SourceError):
        found = parse(*arguments)
        if isinstance(found, Reading):
            _can_be_logged(found)


def _can_be_logged(reading: Reading) -> str:
    return json.dumps(reading_to_json(reading), allow_nan=False)


def _series(labels: dict[str, Any], values: list[Any], name: str) -> dict[str, Any]:
    return {"metric": {"__name__": name, **labels}, "values": values}


_SERIES = st.builds(
    _series,
    _LABELS,
    _SAMPLES,
    st.sampled_from(["sglang:num_queue_reqs", "sglang_time_to_first_token_seconds_bucket"]),
)


@given(st.lists(_SERIES | _JSON, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_series_of_prometheus(series: list[Any]) -> None:
    text = json.dumps({"status": "success", "data": {"result": series}})
    _tried(parse_answer, text, 0.0, PROMETHEUS)
    _tried(parse_time, text)


@given(_JSON)
@settings(max_examples=100, deadline=None)
def test_any_json(content: Any) -> None:
    text = json.dumps(content)
    for parse in (parse_loads, parse_time):
        _tried(parse, text)
    _tried(parse_answer, text, 0.0, PROMETHEUS)


_CUTS = {"place": st.floats(0, 1), "length": st.integers(0, 40), "inserted": st.text(max_size=12)}


def _cut(source: str, place: float, length: int, inserted: str) -> str:
    start = round(place * len(source))
    return source[:start] + inserted + source[start + length :]


@given(**_CUTS)
@settings(max_examples=100, deadline=None)
def test_any_piece_of_a_metrics_page_replaced(place: float, length: int, inserted: str) -> None:
    _tried(parse_metrics, _cut(PAGE, place, length, inserted), 0.0, SourceSettings())


@given(**_CUTS)
@settings(max_examples=100, deadline=None)
def test_any_piece_of_the_loads_replaced(place: float, length: int, inserted: str) -> None:
    _tried(parse_loads, _cut(LOADS, place, length, inserted))


def test_a_bucket_edge_that_is_no_number_is_told() -> None:
    """It ended the reading thread once, and the controller went blind without a word."""
    for edge in ("x", "NaN", ""):
        with pytest.raises(SourceError, match="bucket edge is no number"):
            parse_metrics(PAGE.replace('le="0.05"', f'le="{edge}"'), 0.0, SourceSettings())


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_an_answer_nested_without_end(opening: str) -> None:
    text = opening * 100_000
    for parse in (parse_loads, parse_time):
        _tried(parse, text)


@pytest.mark.parametrize("number", ["NaN", "+Inf", "-Inf"])
def test_a_sum_that_is_no_finite_number_counts_as_not_known(number: str) -> None:
    """One odd latency makes it so for good, and failed each tick that was logged."""
    page = re.sub(r"(?m)^(sglang:inter_token_latency_seconds_sum.*) \S+$", rf"\1 {number}", PAGE)
    reading, whole = (parse_metrics(text, 0.0, SourceSettings()) for text in (page, PAGE))
    assert _can_be_logged(reading)
    assert reading.ttft == whole.ttft
    assert {name: one.counts for name, one in reading.itl.items()} == {
        name: one.counts for name, one in whole.itl.items()
    }
    assert {one.sum_seconds for one in reading.itl.values()} == {0.0}
    assert {one.sum_seconds for one in whole.itl.values()} != {0.0}


def test_a_real_answer_is_a_reading_that_can_be_logged() -> None:
    assert _can_be_logged(parse_metrics(PAGE, 0.0, SourceSettings()))
