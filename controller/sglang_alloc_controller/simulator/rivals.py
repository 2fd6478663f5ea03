"""Simulator, rivals: the rules that people would write first, or have written. Pure.

All act on the worse of the two latencies, as their originals do on their one latency. Where an
original moves a limit (of concurrency, of a threshold), here it moves the position of the budgets.
"""

import math
from collections import deque

from sglang_alloc_controller.simulator.rival_signals import Observed


class ThresholdSteps:
    """BrownoutServe's rule: times 0.8 when the latency is above the SLO, plus 0.1 when well below.

    Every 5 s on the latency that the objective's share stays under (theirs is P90), with "well
    below" at 0.8 of the SLO.
    """

    period_seconds, window_seconds = 5.0, 5.0

    def next(self, position: float, observed: Observed) -> float:
        """Return the next position."""
        if observed.worst_ratio > 1.0:
            return 0.8 * position
        return position + 0.1 if observed.worst_ratio < 0.8 else position


class Aimd:
    """Additive increase, multiplicative decrease, as TCP's congestion window: +0.02, or half."""

    period_seconds, window_seconds = 5.0, 10.0

    def next(self, position: float, observed: Observed) -> float:
        """Return the next position."""
        return 0.5 * position if observed.worst_ratio > 1.0 else position + 0.02


class PlainPi:
    """A proportional-integral controller of the latency ratio, with a clamped integral.

    Its set point is 0.8 of the SLO: a regulator is above it about as often as below.
    """

    period_seconds, window_seconds = 1.0, 10.0
    _SET_POINT, _PROPORTIONAL, _INTEGRAL_PER_SECOND, _RATIO_MAX = 0.8, 0.2, 0.02, 2.0

    def __init__(self) -> None:
        """Begin with the integral at the ceiling."""
        self._integral = 1.0

    def next(self, position: float, observed: Observed) -> float:
        """Return the next position."""
        error = self._SET_POINT - min(self._RATIO_MAX, observed.worst_ratio)
        gain = self._INTEGRAL_PER_SECOND * self.period_seconds
        self._integral = min(1.0, max(0.0, self._integral + gain * error))
        return self._integral + self._PROPORTIONAL * error


class SmoothedRatio:
    """A smoothed ratio with a dead band well below 1, in the manner of llm-d's autoscaler.

    The worst ratio is clamped at 2 before smoothing; above 0.55 a step down, below 0.40 one up.
    """

    period_seconds, window_seconds = 5.0, 10.0
    _RATIO_MAX, _SMOOTHING, _HIGH, _LOW = 2.0, 0.3, 0.55, 0.40
    _DOWN, _UP = 0.1, 0.05

    def __init__(self) -> None:
        """Begin without a smoothed ratio."""
        self._smoothed = 0.0

    def next(self, position: float, observed: Observed) -> float:
        """Return the next position."""
        ratio = min(self._RATIO_MAX, observed.worst_ratio)
        self._smoothed += self._SMOOTHING * (ratio - self._smoothed)
        if self._smoothed > self._HIGH:
            return position - self._DOWN
        return position + self._UP if self._smoothed < self._LOW else position


class Gradient:
    """Envoy's adaptive concurrency: limit * gradient + sqrt(limit), on a limit of 1 to 100.

    gradient = (1 + buffer) * smallest median / median, within (0.5, 2), of the worse latency. Envoy
    measures its smallest latency at a low limit once a minute; here it is the smallest median of
    the last ten minutes, which costs no capacity.
    """

    period_seconds, window_seconds = 5.0, 10.0
    _BUFFER, _BOUNDS, _REMEMBERED = 0.25, (0.5, 2.0), 120
    _LIMIT_MAX = 100.0

    def __init__(self) -> None:
        """Begin without a smallest latency."""
        self._medians: deque[tuple[float, ...]] = deque(maxlen=self._REMEMBERED)

    def next(self, position: float, observed: Observed) -> float:
        """Return the next position."""
        if len(observed.medians_seconds) < 2:
            return position
        self._medians.append(observed.medians_seconds)
        smallest = [min(column) for column in zip(*self._medians, strict=True)]
        gradient = min(
            (1.0 + self._BUFFER) * low / max(low, now)
            for low, now in zip(smallest, observed.medians_seconds, strict=True)
        )
        gradient = min(self._BOUNDS[1], max(self._BOUNDS[0], gradient))
        limit = max(1.0, position * self._LIMIT_MAX)
        wanted: float = limit * gradient + math.sqrt(limit)
        return wanted / self._LIMIT_MAX
