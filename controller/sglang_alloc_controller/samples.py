"""Control story, between reading and judging: what one reading of SGLang's metrics holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple, Protocol

from sglang_alloc import allocation_mode
from sglang_alloc.errors import AllocError

Phase = allocation_mode.Phase
PHASES = allocation_mode.PHASES
Slo = Literal["ttft", "itl"]
SLOS: tuple[Slo, ...] = ("ttft", "itl")
# The latency that each phase's budget buys.
SLO_OF_PHASE: Mapping[Phase, Slo] = {"prefill": "ttft", "decode": "itl"}


class SourceError(AllocError):
    """A reading failed: the server is away, hangs, or answers with something else."""


class InputState(Enum):
    """What the readings are worth now."""

    VALID = "valid"
    """Fresh, and the server has work."""
    IDLE = "idle"
    """Fresh, and the server has had no work for a while."""
    STALE = "stale"
    """Too old, or never there."""


class Histogram(NamedTuple):
    """One histogram series, cumulative over buckets and since the engine's start."""

    edges: tuple[float, ...]
    """Upper edges in seconds, ascending; the last is infinity."""
    counts: tuple[float, ...]
    """Events at or under each edge."""
    sum_seconds: float
    """Sum of the latencies."""


class RankTime(NamedTuple):
    """What one rank has done since its start."""

    steps: float = 0.0
    """Decode steps."""
    seconds: float = 0.0
    """Their time."""
    requests: float = 0.0
    """Sum over them of the requests that took part in each."""
    prefill_tokens: float = 0.0
    """Prompt tokens that were computed; 0: the release does not tell."""
    prefill_seconds: float = 0.0


class EngineLoad(NamedTuple):
    """What SGLang's /v1/loads says of the moment, over all ranks of one engine."""

    age_seconds: float
    """Time since the last step of the rank that is furthest behind; 0 while none has work."""
    queue_requests: float
    """Waiting requests of the rank that has most."""
    running_requests: float
    """Running requests of the rank that has most."""
    waiting_tokens: float
    """Prompt tokens that wait for computation, those in the prefix cache left out; largest rank."""
    token_usage_ratio: float
    """Filled share of the KV cache, of the fullest rank."""
    tokens_per_second: float
    """Generated tokens per second, summed over ranks."""
    rank_times: Mapping[int, RankTime]
    """By data-parallel rank; empty before 0.5.17 and until the first decode step."""


@dataclass(frozen=True)
class Reading:
    """One reading: counters since the engine's start and gauges of the moment.

    The histograms are kept apart by series (rank, replica, model), because only the difference of
    one series tells a restart of its engine from progress.
    """

    taken_at_seconds: float
    """When the values were true, monotonic clock."""
    ttft: Mapping[str, Histogram]
    itl: Mapping[str, Histogram]
    queue_requests: float
    """Waiting requests, of the rank or replica that has most."""
    running_requests: float
    """Running requests, of the rank or replica that has most."""
    edges: Mapping[Slo, frozenset[float]] = field(default_factory=dict)
    """Bucket edges seen in any series, those of requests that do not stream included."""
    load: EngineLoad | None = None
    """What /v1/loads says besides; None: not asked, or not offered."""
    prefill_tokens: float | None = None
    """Prompt tokens computed since the engines' start, those in the prefix cache left out, summed
    over engines; None: no server tells, or none has answered a request yet."""
    engines: int = 1
    """Engines that `prefill_tokens` and the histograms are of: servers, or their data-parallel
    ranks."""
    rank_times: Mapping[int, RankTime] = field(default_factory=dict)
    """What each data-parallel rank has done since its start; empty: the server does not tell."""
    model_names: frozenset[str] = frozenset()
    """Names of the models that the series belong to."""
    priorities: frozenset[str] = frozenset()
    """Priorities that the series tell apart; empty: the server does not schedule by priority, or
    has not seen a request yet."""

    def series(self, slo: Slo) -> Mapping[str, Histogram]:
        """Return the histogram series of one latency."""
        return self.ttft if slo == "ttft" else self.itl

    def event_count(self, slo: Slo) -> float:
        """Return the number of events of one latency since the engine's start."""
        return sum(histogram.counts[-1] for histogram in self.series(slo).values())


class MetricsSource(Protocol):
    """Anything that can be read: the server itself, or a Prometheus server."""

    def read(self) -> Reading:
        """Read once, within the source's time limit.

        Raises:
            SourceError: no reading; the message says what was asked and what came.
        """

    def close(self) -> None:
        """Close the connections."""
