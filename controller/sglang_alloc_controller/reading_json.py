"""Control story, after the last step: readings as JSON and back, bit for bit, for replay."""

import math
from collections.abc import Mapping
from typing import Any

from sglang_alloc_controller.samples import Histogram, RankTime, Reading, Slo


def reading_to_json(reading: Reading) -> dict[str, Any]:
    """Return what the law can see of a reading; floats keep every bit, infinity becomes null."""
    return {
        "taken_at_seconds": reading.taken_at_seconds,
        "ttft": _series_to_json(reading.ttft),
        "itl": _series_to_json(reading.itl),
        "queue_requests": reading.queue_requests,
        "running_requests": reading.running_requests,
        "prefill_tokens": reading.prefill_tokens,
        "engines": reading.engines,
        "rank_times": {rank: list(one) for rank, one in reading.rank_times.items()},
        "edges": {slo: _edges_to_json(tuple(sorted(e))) for slo, e in reading.edges.items()},
    }


def reading_from_json(content: Mapping[str, Any]) -> Reading:
    """Return the reading that `reading_to_json` made this of.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    edges: dict[Slo, frozenset[float]] = {
        slo: frozenset(_edges_from_json(found)) for slo, found in content["edges"].items()
    }
    # Logs of earlier versions lack the tokens, the engines and the decode times.
    tokens, decoded = content.get("prefill_tokens"), content.get("rank_times", {})
    return Reading(
        taken_at_seconds=float(content["taken_at_seconds"]),
        ttft=_series_from_json(content["ttft"]),
        itl=_series_from_json(content["itl"]),
        queue_requests=float(content["queue_requests"]),
        running_requests=float(content["running_requests"]),
        edges=edges,
        prefill_tokens=None if tokens is None else float(tokens),
        engines=int(content.get("engines", 1)),
        rank_times={int(rank): RankTime(*map(float, one)) for rank, one in decoded.items()},
    )


def _series_to_json(series: Mapping[str, Histogram]) -> dict[str, list[Any]]:
    return {
        name: [_edges_to_json(one.edges), list(one.counts), one.sum_seconds]
        for name, one in series.items()
    }


def _series_from_json(content: Mapping[str, list[Any]]) -> dict[str, Histogram]:
    return {
        name: Histogram(_edges_from_json(edges), tuple(counts), float(sum_seconds))
        for name, (edges, counts, sum_seconds) in content.items()
    }


def _edges_to_json(edges: tuple[float, ...]) -> list[float | None]:
    return [None if math.isinf(edge) else edge for edge in edges]


def _edges_from_json(edges: list[float | None]) -> tuple[float, ...]:
    return tuple(math.inf if edge is None else float(edge) for edge in edges)
