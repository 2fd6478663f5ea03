"""Control story, first step: samples of ranks, replicas and buckets, folded into a reading."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from sglang_alloc_controller.samples import Histogram, Reading, Slo, SourceError
from sglang_alloc_controller.settings import SourceSettings

_SLO_OF_HISTOGRAM: Mapping[str, Slo] = {
    "time_to_first_token_seconds": "ttft",
    "inter_token_latency_seconds": "itl",
}
# Tokens by how they came about, and which of them are prompt tokens that were computed.
TOKENS, COMPUTED_TOKENS = "realtime_tokens_total", "prefill_compute"
_PRIORITY = frozenset({"priority"})
# Tensor, pipeline and expert ranks compute every request of their engine together, and each of them
# counts all of it; what differs in any other label has requests of its own.
SHARING_RANKS = frozenset({"tp_rank", "pp_rank", "moe_ep_rank"})


class Labels(NamedTuple):
    """What the labels of one sample say to us."""

    series: str
    """All labels but the bucket edge: the name of the series."""
    rank: str
    """The same without the priority: the rank or replica that reports."""
    engine: str
    """The same without the ranks that share each request: the engine that has requests of its own,
    a server or one of its data-parallel ranks."""
    edge_seconds: float | None
    is_streaming: str | None
    priority: str
    model_name: str | None
    mode: str
    """How tokens were computed: prefill_compute, prefill_cache or decode."""
    target: str
    """Job and instance that Prometheus scraped; "/" when the server was read directly."""

    @classmethod
    def of(cls, labels: Mapping[str, str]) -> "Labels":
        """Read a label set; a bucket edge that is no number raises ValueError."""
        edge = None if "le" not in labels else float(labels["le"])
        if edge is not None and math.isnan(edge):
            raise ValueError("a bucket edge is NaN")
        rest = {k: v for k, v in sorted(labels.items()) if k not in {"le", "__name__"}}
        return cls(
            series=_written(rest, frozenset()),
            rank=_written(rest, _PRIORITY),
            engine=_written(rest, _PRIORITY | SHARING_RANKS),
            edge_seconds=edge,
            is_streaming=labels.get("is_streaming"),
            priority=labels.get("priority", ""),
            model_name=labels.get("model_name"),
            mode=labels.get("mode", ""),
            target=f"{labels.get('job', '')}/{labels.get('instance', '')}",
        )


class SeriesFold:
    """Collects the samples of one reading.

    Gauges: the maximum over ranks and replicas, since tensor ranks repeat each other and the worst
    queue is the one that hurts. Under priority scheduling SGLang reports the total with an empty
    priority and its parts besides: the total counts, or the chosen priorities' parts are added up
    for each rank. A server that shows no parts is counted whole. Histograms stay apart by series;
    those of other priorities are left out.

    Prompt tokens: the maximum over the ranks of an engine, which all count the same, and the sum
    over engines, since the requests are counted over all of them too. A target without latencies is
    no engine but another node of one.
    """

    def __init__(self, settings: SourceSettings) -> None:
        """Start empty; the settings say which requests, model and priorities count."""
        self._settings = settings
        # By gauge, rank and priority, so that a sample that comes twice counts once.
        self._gauges: dict[str, dict[str, dict[str, float]]] = {}
        self._buckets: dict[tuple[Slo, str], dict[float, float]] = {}
        self._sums: dict[tuple[Slo, str], float] = {}
        self._edges: dict[Slo, set[float]] = {"ttft": set(), "itl": set()}
        self._model_names: set[str] = set()
        self._priorities: set[str] = set()
        self._prefill_tokens: dict[Labels, float] = {}
        self._serving_targets: set[str] = set()

    def add(self, name: str, labels: Labels, value: float) -> None:
        """Add one sample of `name`, which is without its sglang prefix."""
        model_name = self._settings.model_name
        if model_name is not None and labels.model_name not in {None, model_name}:
            return
        self._model_names.add(labels.model_name or "")
        self._priorities.add(labels.priority)
        if name == TOKENS:
            if labels.mode == COMPUTED_TOKENS and math.isfinite(value):
                self._prefill_tokens[labels] = value
            return
        base, _, part = name.rpartition("_")
        if base in _SLO_OF_HISTOGRAM:
            self._add_to_histogram(_SLO_OF_HISTOGRAM[base], part, labels, value)
        elif math.isfinite(value):
            parts = self._gauges.setdefault(name, {}).setdefault(labels.rank, {})
            parts[labels.priority] = max(value, parts.get(labels.priority, 0.0))

    def has_gauges(self) -> bool:
        """Tell whether the totals of both gauges were there."""
        return all(
            any("" in parts for parts in self._gauges.get(name, {}).values())
            for name in ("num_queue_reqs", "num_running_reqs")
        )

    def reading(self, taken_at_seconds: float) -> Reading:
        """Return what was added, as one reading.

        Raises:
            SourceError: a histogram has no +Inf bucket, or a count that is not finite.
        """
        prefill_tokens = self._prefill_tokens_by_engine()
        series: dict[Slo, dict[str, Histogram]] = {"ttft": {}, "itl": {}}
        for (slo, name), buckets in self._buckets.items():
            series[slo][name] = _histogram(name, buckets, self._sums.get((slo, name), 0.0))
        return Reading(
            taken_at_seconds=taken_at_seconds,
            ttft=series["ttft"],
            itl=series["itl"],
            queue_requests=self._largest("num_queue_reqs", self._settings.priorities),
            running_requests=self._largest("num_running_reqs", None),
            edges={slo: frozenset(edges) for slo, edges in self._edges.items()},
            prefill_tokens=sum(prefill_tokens.values()) if prefill_tokens else None,
            engines=max(1, len(prefill_tokens)),
            model_names=frozenset(self._model_names - {""}),
            priorities=frozenset(self._priorities - {""}),
        )

    def _prefill_tokens_by_engine(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for labels, value in self._prefill_tokens.items():
            if labels.target in self._serving_targets:
                found[labels.engine] = max(value, found.get(labels.engine, 0.0))
        return found

    def _largest(self, name: str, priorities: list[str] | None) -> float:
        """Return the gauge of the rank that has most, of these priorities or in total."""
        apart = any(parts.keys() - {""} for parts in self._gauges[name].values())
        chosen = set(priorities) if priorities is not None and apart else {""}
        return max(
            sum(value for priority, value in parts.items() if priority in chosen)
            for parts in self._gauges[name].values()
        )

    def _add_to_histogram(self, slo: Slo, part: str, labels: Labels, value: float) -> None:
        if labels.edge_seconds is not None:
            self._edges[slo].add(labels.edge_seconds)
            self._serving_targets.add(labels.target)
        if not self._counts(labels):
            return
        key = (slo, labels.series)
        if part == "sum":
            # One odd latency makes it NaN for good. The counts are right even so, and decide.
            self._sums[key] = value if math.isfinite(value) else 0.0
        elif labels.edge_seconds is not None:
            self._buckets.setdefault(key, {})[labels.edge_seconds] = value

    def _counts(self, labels: Labels) -> bool:
        # Servers without a label are counted whole: there is nothing to tell requests apart by.
        if self._settings.streaming_only and labels.is_streaming == "false":
            return False
        priorities = self._settings.priorities
        return priorities is None or labels.priority == "" or labels.priority in priorities


def unseen_priorities(reading: Reading, settings: SourceSettings) -> str | None:
    """Return a sentence about chosen priorities that the server does not show; None: it does.

    Nothing is said of a server that has answered no request.
    """
    unseen = set(settings.priorities or ()) - reading.priorities
    if not unseen or not (reading.priorities or reading.event_count("ttft")):
        return None
    listed = ", ".join(sorted(unseen))
    if not reading.priorities:
        return (
            f"source.priorities chooses {listed}, but the server shows no priorities, so all its "
            "requests count. Start SGLang with --enable-priority-scheduling, or remove the setting."
        )
    return (
        f"source.priorities chooses {listed}, which the server has not shown yet; it shows "
        f"{', '.join(sorted(reading.priorities))}. Correct the setting unless such requests are "
        "still to come."
    )


def _written(labels: Mapping[str, str], without: frozenset[str]) -> str:
    return ",".join(f'{key}="{value}"' for key, value in labels.items() if key not in without)


def _histogram(name: str, buckets: dict[float, float], sum_seconds: float) -> Histogram:
    edges = tuple(sorted(buckets))
    counts = tuple(buckets[edge] for edge in edges)
    if not math.isinf(edges[-1]) or not all(math.isfinite(count) for count in counts):
        raise SourceError(
            f"The histogram {{{name}}} has the counts {counts} at the edges {edges}, where finite "
            "counts up to +Inf belong. It was read while it was being written, or is garbled."
        )
    return Histogram(edges, counts, sum_seconds)
