"""Control story, first step: samples of ranks, replicas and buckets, folded into a reading."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from sglang_alloc_controller.samples import Histogram, Reading, Slo, SourceError

_SLO_OF_HISTOGRAM: Mapping[str, Slo] = {
    "time_to_first_token_seconds": "ttft",
    "inter_token_latency_seconds": "itl",
}


class Labels(NamedTuple):
    """What the labels of one sample say to us."""

    series: str
    """All labels but the bucket edge: the name of the series."""
    edge_seconds: float | None
    is_streaming: str | None
    priority: str
    model_name: str | None
    target: str
    """Job and instance that Prometheus scraped; "/" when the server was read directly."""

    @classmethod
    def of(cls, labels: Mapping[str, str]) -> "Labels":
        """Read a label set; a bucket edge that is no number raises ValueError."""
        edge = labels.get("le")
        rest = sorted((k, v) for k, v in labels.items() if k not in {"le", "__name__"})
        return cls(
            series=",".join(f'{key}="{value}"' for key, value in rest),
            edge_seconds=None if edge is None else float(edge),
            is_streaming=labels.get("is_streaming"),
            priority=labels.get("priority", ""),
            model_name=labels.get("model_name"),
            target=f"{labels.get('job', '')}/{labels.get('instance', '')}",
        )


class SeriesFold:
    """Collects the samples of one reading.

    Gauges: the maximum over ranks and replicas, since tensor ranks repeat each other and the worst
    queue is the one that hurts. Under priority scheduling SGLang reports the total with an empty
    priority and its parts besides: only the total counts. Histograms stay apart by series.
    """

    def __init__(self, streaming_only: bool, model_name: str | None) -> None:
        """Start empty; see `SourceSettings` for the two filters."""
        self._streaming_only = streaming_only
        self._model_name = model_name
        self._gauges: dict[str, float] = {}
        self._buckets: dict[tuple[Slo, str], dict[float, float]] = {}
        self._sums: dict[tuple[Slo, str], float] = {}
        self._edges: dict[Slo, set[float]] = {"ttft": set(), "itl": set()}

    def add(self, name: str, labels: Labels, value: float) -> None:
        """Add one sample of `name`, which is without its sglang prefix."""
        if self._model_name is not None and labels.model_name not in {None, self._model_name}:
            return
        base, _, part = name.rpartition("_")
        if base in _SLO_OF_HISTOGRAM:
            self._add_to_histogram(_SLO_OF_HISTOGRAM[base], part, labels, value)
        elif labels.priority == "" and math.isfinite(value):
            self._gauges[name] = max(value, self._gauges.get(name, 0.0))

    def has_gauges(self) -> bool:
        """Tell whether both gauges were there."""
        return {"num_queue_reqs", "num_running_reqs"} <= self._gauges.keys()

    def reading(self, taken_at_seconds: float) -> Reading:
        """Return what was added, as one reading.

        Raises:
            SourceError: a histogram has no +Inf bucket, or a count that is not finite.
        """
        series: dict[Slo, dict[str, Histogram]] = {"ttft": {}, "itl": {}}
        for (slo, name), buckets in self._buckets.items():
            series[slo][name] = _histogram(name, buckets, self._sums.get((slo, name), 0.0))
        return Reading(
            taken_at_seconds=taken_at_seconds,
            ttft=series["ttft"],
            itl=series["itl"],
            queue_requests=self._gauges["num_queue_reqs"],
            running_requests=self._gauges["num_running_reqs"],
            edges={slo: frozenset(edges) for slo, edges in self._edges.items()},
        )

    def _add_to_histogram(self, slo: Slo, part: str, labels: Labels, value: float) -> None:
        if labels.edge_seconds is not None:
            self._edges[slo].add(labels.edge_seconds)
        # Servers without the label are counted whole: there is nothing to tell requests apart by.
        if self._streaming_only and labels.is_streaming == "false":
            return
        key = (slo, labels.series)
        if part == "sum":
            self._sums[key] = value
        elif labels.edge_seconds is not None:
            self._buckets.setdefault(key, {})[labels.edge_seconds] = value


def _histogram(name: str, buckets: dict[float, float], sum_seconds: float) -> Histogram:
    edges = tuple(sorted(buckets))
    counts = tuple(buckets[edge] for edge in edges)
    if not math.isinf(edges[-1]) or not all(math.isfinite(count) for count in counts):
        raise SourceError(
            f"The histogram {{{name}}} has the counts {counts} at the edges {edges}, where finite "
            "counts up to +Inf belong. It was read while it was being written, or is garbled."
        )
    return Histogram(edges, counts, sum_seconds)
