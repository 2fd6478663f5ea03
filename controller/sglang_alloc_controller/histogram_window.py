"""Control story, second step: two cumulative snapshots become the events between them. Pure."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from operator import lt, sub

from sglang_alloc_controller.samples import Histogram

# Edges are decimal numbers that were written and parsed as text, so they differ by rounding only.
_EDGE_TOLERANCE_RATIO = 1e-9


def restarted(older: Mapping[str, Histogram], newer: Mapping[str, Histogram]) -> bool:
    """Tell whether an engine started anew in between.

    A counter never falls in one life of an engine and its series never vanish or change edges. That
    of one bucket tells a restart that was not seen, by one that has had more events since.
    """
    return any(
        name not in newer
        or newer[name].edges != histogram.edges
        or any(map(lt, newer[name].counts, histogram.counts))
        for name, histogram in older.items()
    )


def events_between(
    older: Mapping[str, Histogram], newer: Mapping[str, Histogram]
) -> Histogram | None:
    """Return the events between two snapshots without a restart, summed over the series.

    A series that is new counts from zero. Series with other edges are added on the edges that all
    share. None: there is no series yet.
    """
    if not newer:
        return None
    changes = [_difference(older.get(name), histogram) for name, histogram in newer.items()]
    if len(changes) == 1:
        return changes[0]
    edges = set(changes[0].edges).intersection(*(change.edges for change in changes))
    shared = tuple(sorted(edges))
    return Histogram(
        edges=shared,
        counts=tuple(sum(_count_at(change, edge) for change in changes) for edge in shared),
        sum_seconds=math.fsum(change.sum_seconds for change in changes),
    )


def has_edge(edges: "frozenset[float] | tuple[float, ...]", seconds: float) -> bool:
    """Tell whether `seconds` is one of the bucket edges."""
    return any(_same_edge(edge, seconds) for edge in edges)


def within_ratio(events: Histogram, slo_seconds: float) -> float | None:
    """Return the share of the events at or under `slo_seconds`, exact because it is an edge.

    None: there are no events, or `slo_seconds` is not an edge, where a share would be a guess.
    """
    total = events.counts[-1]
    if total <= 0:
        return None
    at = _edge_at(events.edges, slo_seconds)
    return None if at is None else events.counts[at] / total


def mean_seconds(events: Histogram) -> float | None:
    """Return the mean latency, exact whatever the buckets; None without events."""
    total = events.counts[-1]
    return events.sum_seconds / total if total > 0 else None


def quantile_seconds(events: Histogram, ratio: float) -> float | None:
    """Estimate the latency that `ratio` of the events stay under; None without events.

    The events of a bucket count as spread evenly over it. Beyond the last finite edge that edge
    is returned: a lower bound.
    """
    total = events.counts[-1]
    if total <= 0:
        return None
    edges, counts, rank = events.edges, events.counts, ratio * total
    at = bisect_left(counts, rank)
    lower_edge, lower_count = (edges[at - 1], counts[at - 1]) if at else (0.0, 0.0)
    edge, count = edges[at], counts[at]
    if math.isinf(edge):
        return lower_edge
    if count == lower_count:
        return edge
    return lower_edge + (edge - lower_edge) * (rank - lower_count) / (count - lower_count)


def _difference(older: Histogram | None, newer: Histogram) -> Histogram:
    if older is None:
        return newer
    # A scrape may fall between SGLang's update of one bucket and of the next, so a difference can
    # shrink from one edge to the next by an event; a running maximum keeps it cumulative.
    counts = [0.0, *map(sub, newer.counts, older.counts)]
    if counts != sorted(counts):
        counts = [*accumulate(counts, max)]
    sum_seconds = max(0.0, newer.sum_seconds - older.sum_seconds)
    return Histogram(newer.edges, tuple(counts[1:]), sum_seconds)


def _count_at(histogram: Histogram, edge: float) -> float:
    return histogram.counts[histogram.edges.index(edge)]


def _edge_at(edges: tuple[float, ...], seconds: float) -> int | None:
    """Return which of the edges is at `seconds`, or None."""
    at = bisect_left(edges, seconds * (1.0 - _EDGE_TOLERANCE_RATIO))
    return at if at < len(edges) and _same_edge(edges[at], seconds) else None


def _same_edge(edge: float, seconds: float) -> bool:
    return math.isclose(edge, seconds, rel_tol=_EDGE_TOLERANCE_RATIO)
