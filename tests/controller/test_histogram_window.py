"""Cumulative snapshots to events: exact at edges, honest about restarts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_alloc_controller.histogram_window import (
    events_between,
    has_edge,
    mean_seconds,
    quantile_seconds,
    restarted,
    within_ratio,
)
from sglang_alloc_controller.samples import Histogram

EDGES = (0.1, 0.2, 0.5, 1.0, math.inf)
latencies = st.lists(st.floats(0, 3), max_size=50)


def _histogram(seconds: list[float], edges: tuple[float, ...] = EDGES) -> Histogram:
    counts = tuple(float(sum(one <= edge for one in seconds)) for edge in edges)
    return Histogram(edges, counts, math.fsum(seconds))


@given(before=latencies, after=latencies)
def test_the_difference_is_the_histogram_of_the_events_in_between(
    before: list[float], after: list[float]
) -> None:
    events = events_between({"a": _histogram(before)}, {"a": _histogram(before + after)})
    assert events is not None
    assert events.counts == _histogram(after).counts
    assert events.sum_seconds == pytest.approx(math.fsum(after), abs=1e-9)


@given(before=latencies, after=latencies, other=latencies)
def test_series_add_up_and_a_new_one_counts_from_zero(
    before: list[float], after: list[float], other: list[float]
) -> None:
    older = {"a": _histogram(before)}
    newer = {"a": _histogram(before + after), "b": _histogram(other)}
    events = events_between(older, newer)
    assert events is not None
    assert events.counts == _histogram(after + other).counts


@given(after=latencies.filter(bool))
def test_the_share_within_an_edge_is_exact(after: list[float]) -> None:
    share = sum(one <= 0.5 for one in after) / len(after)
    assert within_ratio(_histogram(after), 0.5) == pytest.approx(share)


@given(before=latencies, after=latencies)
def test_progress_is_no_restart(before: list[float], after: list[float]) -> None:
    assert not restarted({"a": _histogram(before)}, {"a": _histogram(before + after)})


@given(before=latencies, after=latencies)
def test_a_counter_that_fell_is_a_restart(before: list[float], after: list[float]) -> None:
    older, newer = _histogram(before), _histogram(after)
    fell = any(new < old for old, new in zip(older.counts, newer.counts, strict=True))
    assert restarted({"a": older}, {"a": newer}) is fell


def test_a_restart_shows_in_one_bucket_though_more_was_done_since() -> None:
    fast, slow = _histogram([0.1, 0.1]), _histogram([0.1, 5.0, 5.0])
    assert restarted({"a": fast}, {"a": slow})


@given(after=latencies.filter(bool), ratio=st.floats(0.01, 0.99))
def test_a_quantile_lies_in_the_bucket_of_its_rank(after: list[float], ratio: float) -> None:
    events = _histogram(after)
    found = quantile_seconds(events, ratio)
    rank = ratio * len(after)
    bucket = next(i for i, count in enumerate(events.counts) if count >= rank)
    lower = EDGES[bucket - 1] if bucket else 0.0
    assert found is not None
    assert lower <= found <= min(EDGES[bucket], 1.0) + 1e-12


def test_a_series_that_vanished_is_a_restart() -> None:
    assert restarted({"a": _histogram([0.1])}, {})


def test_other_bucket_edges_are_a_restart() -> None:
    other = _histogram([0.1], (0.1, math.inf))
    assert restarted({"a": _histogram([0.1])}, {"a": other})


def test_a_series_that_appears_is_no_restart() -> None:
    assert not restarted({}, {"a": _histogram([0.1])})


def test_replicas_with_other_edges_are_added_on_the_shared_ones() -> None:
    newer = {"a": _histogram([0.1, 0.4]), "b": _histogram([0.4], (0.5, math.inf))}
    assert events_between({}, newer) == Histogram((0.5, math.inf), (3.0, 3.0), pytest.approx(0.9))


def test_no_series_is_no_window() -> None:
    assert events_between({}, {}) is None


def test_a_share_at_something_else_than_an_edge_is_not_guessed() -> None:
    assert within_ratio(_histogram([0.1]), 0.3) is None


def test_without_events_there_is_neither_share_nor_mean_nor_quantile() -> None:
    nothing = _histogram([])
    assert within_ratio(nothing, 0.5) is None
    assert mean_seconds(nothing) is None
    assert quantile_seconds(nothing, 0.95) is None


def test_a_quantile_is_interpolated_within_its_bucket() -> None:
    # 10 events in (0.2, 0.5]: the fifth lies in the middle.
    events = Histogram(EDGES, (0.0, 0.0, 10.0, 10.0, 10.0), 3.5)
    assert quantile_seconds(events, 0.5) == pytest.approx(0.35)
    assert mean_seconds(events) == pytest.approx(0.35)


def test_a_quantile_beyond_the_last_edge_is_that_edge() -> None:
    assert quantile_seconds(_histogram([5.0, 6.0]), 0.95) == 1.0


def test_a_scrape_between_two_bucket_updates_stays_cumulative() -> None:
    older = {"a": Histogram(EDGES, (4.0, 4.0, 4.0, 4.0, 4.0), 0.4)}
    newer = {"a": Histogram(EDGES, (6.0, 5.0, 5.0, 6.0, 6.0), 0.6)}
    events = events_between(older, newer)
    assert events is not None
    assert events.counts == (2.0, 2.0, 2.0, 2.0, 2.0)


def test_edges_are_compared_as_the_decimal_numbers_they_were_written_as() -> None:
    assert has_edge(EDGES, 0.1 + 0.1)
    assert has_edge((0.1 + 0.2,), 0.3)
    assert not has_edge(EDGES, 0.21)
