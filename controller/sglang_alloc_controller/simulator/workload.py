"""Simulator, second step: the requests that arrive, and when. A seed gives one workload."""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

Rate = Callable[[float], float]
"""Requests per second by second."""


class RequestMix(NamedTuple):
    """Sizes of the requests: log-normal around a median, clamped to (1/4, 4) of it."""

    prompt_tokens: int
    output_tokens: int
    spread: float = 0.0
    """Standard deviation of the logarithm; 0: all alike."""


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival; the columns are of equal length."""

    arrival_seconds: tuple[float, ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.arrival_seconds)


def poisson_workload(
    rate: Rate,
    rate_max: float,
    seconds: float,
    mix_at: Callable[[float], RequestMix],
    seed: int,
) -> Workload:
    """Draw arrivals of a varying rate by thinning those at `rate_max`, and their sizes."""
    generator = random.Random(seed)
    arrivals, prompts, outputs = [], [], []
    for second in _thinned(rate, rate_max, seconds, generator):
        mix = mix_at(second)
        arrivals.append(second)
        prompts.append(_size(mix.prompt_tokens, mix.spread, generator))
        outputs.append(_size(mix.output_tokens, mix.spread, generator))
    return Workload(tuple(arrivals), tuple(prompts), tuple(outputs))


class Burstiness(NamedTuple):
    """Two rates, and the mean times that arrivals stay at each."""

    calm: float
    burst: float
    mean_calm_seconds: float
    mean_burst_seconds: float


def markov_rate(burstiness: Burstiness, seconds: float, seed: int) -> Rate:
    """Return a rate that jumps between two levels after exponential times (an MMPP)."""
    generator = random.Random(seed)
    switches: list[float] = []
    second = 0.0
    while second < seconds:
        in_burst = len(switches) % 2
        mean = burstiness.mean_burst_seconds if in_burst else burstiness.mean_calm_seconds
        second += generator.expovariate(1 / mean)
        switches.append(second)

    def rate(now: float) -> float:
        return burstiness.burst if bisect_right(switches, now) % 2 else burstiness.calm

    return rate


def _thinned(
    rate: Rate, rate_max: float, seconds: float, generator: random.Random
) -> Iterator[float]:
    second = generator.expovariate(rate_max)
    while second < seconds:
        if generator.random() * rate_max < rate(second):
            yield second
        second += generator.expovariate(rate_max)


def _size(median: int, spread: float, generator: random.Random) -> int:
    if spread <= 0:
        return median
    factor = math.exp(generator.gauss(0.0, spread))
    return max(1, round(median * min(4.0, max(0.25, factor))))
