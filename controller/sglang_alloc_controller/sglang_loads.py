"""Control story, first step, beside the metrics: SGLang's /v1/loads, what each rank does right now.

Ranks are folded as they hurt: the longest queue, the fullest cache and the slowest step count, and
only throughput is added up. The time of a rank's last step comes with it, by the engine's clock.
"""

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from sglang_alloc_controller.samples import EngineLoad, RankTime, SourceError

LOADS_PATH = "/v1/loads?include=core"
# Every release from 0.5.16 on has these; decode_moments came with 0.5.17.
FIELDS = (
    "dp_rank",
    "gen_throughput",
    "num_running_reqs",
    "num_waiting_reqs",
    "num_waiting_uncached_tokens",
    "timestamp",
    "token_usage",
)
MOMENTS = "decode_moments"
# Not in every release: without them the law goes by the bench.
PREFILLED = ("total_prefill_uncached_tokens", "total_prefill_busy_us")
_MICROSECONDS = 1_000_000


class DecodeMoments(NamedTuple):
    """What `decode_moments` holds, in its order: sums over the decode steps since the start."""

    steps: float
    requests: float
    """Of the batch of each step."""
    microseconds: float
    squared_requests: float
    request_microseconds: float
    tokens: float


class _Rank(NamedTuple):
    age_seconds: float
    dp_rank: int
    running: float
    waiting: float
    waiting_tokens: float
    token_usage: float
    throughput: float
    moments: DecodeMoments | None
    """None: no step yet, or a release that tells them otherwise or not at all."""
    prefilled: tuple[float, ...]
    """Prompt tokens, and the microseconds that they took."""


def parse_loads(text: str) -> EngineLoad:
    """Turn the JSON of /v1/loads into one load.

    Raises:
        SourceError: it is not that JSON, a field is missing, or a number is not finite.
    """
    try:
        answer = json.loads(text)
        answered_at = datetime.fromisoformat(answer["timestamp"].replace("Z", "+00:00"))
        ranks = [_rank(one, answered_at.timestamp()) for one in answer["loads"]]
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise SourceError(
            f"/v1/loads answered with {text[:80]!r}, which is not the JSON of SGLang's loads "
            f"({error}). Check source.url, or set source.loads to false."
        ) from error
    if not ranks:
        raise SourceError("/v1/loads names no rank: the engine has not published a load yet.")
    return _folded(ranks)


def missing_fields(text: str) -> list[str]:
    """Return the fields that the controller reads and that a rank of this answer lacks.

    `decode_moments` is null until the first decode steps, so its name is enough.
    """
    loads = json.loads(text)["loads"]
    read = (*FIELDS, MOMENTS, *PREFILLED)
    return [name for name in read if not all(name in one for one in loads)]


def decode_step_seconds(older: EngineLoad, newer: EngineLoad) -> float | None:
    """Return the mean time of a decode step in between, of the slowest rank; None: no step."""
    means = [
        _mean_between(older.rank_times.get(rank, RankTime()), after)
        for rank, after in newer.rank_times.items()
    ]
    return max((mean for mean in means if mean is not None), default=None)


def _mean_between(before: RankTime, after: RankTime) -> float | None:
    steps = after.steps - before.steps
    return (after.seconds - before.seconds) / steps if steps > 0 else None


def _rank(load: Mapping[str, Any], answered_at_seconds: float) -> _Rank:
    numbers = {name: float(load[name]) for name in FIELDS}
    moments = tuple(float(value) for value in load.get(MOMENTS) or ())
    prefilled = tuple(float(load.get(name) or 0.0) for name in PREFILLED)
    if not all(math.isfinite(value) for value in (*numbers.values(), *moments, *prefilled)):
        raise ValueError("a finite number in every field")
    return _Rank(
        age_seconds=max(0.0, answered_at_seconds - numbers["timestamp"]),
        dp_rank=int(numbers["dp_rank"]),
        running=numbers["num_running_reqs"],
        waiting=numbers["num_waiting_reqs"],
        waiting_tokens=numbers["num_waiting_uncached_tokens"],
        token_usage=numbers["token_usage"],
        throughput=numbers["gen_throughput"],
        moments=_decode_moments(moments),
        prefilled=prefilled,
    )


def _decode_moments(values: tuple[float, ...]) -> DecodeMoments | None:
    return DecodeMoments(*values) if len(values) == len(DecodeMoments._fields) else None


def _folded(ranks: list[_Rank]) -> EngineLoad:
    # An idle rank has no step to be late with, and may publish nothing while it sleeps.
    ages = [rank.age_seconds for rank in ranks if rank.running or rank.waiting]
    return EngineLoad(
        age_seconds=max(ages, default=0.0),
        queue_requests=max(rank.waiting for rank in ranks),
        running_requests=max(rank.running for rank in ranks),
        waiting_tokens=max(rank.waiting_tokens for rank in ranks),
        token_usage_ratio=max(rank.token_usage for rank in ranks),
        tokens_per_second=sum(rank.throughput for rank in ranks),
        rank_times={
            rank.dp_rank: RankTime(
                steps=rank.moments.steps,
                seconds=rank.moments.microseconds / _MICROSECONDS,
                requests=rank.moments.requests,
                prefill_tokens=rank.prefilled[0],
                prefill_seconds=rank.prefilled[1] / _MICROSECONDS,
            )
            for rank in ranks
            if rank.moments is not None
        },
    )
