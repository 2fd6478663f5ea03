"""Control story, third step, forward: what a budget saves, over what its bench says. Pure.

The bench was run once; on the server that it serves, a smaller budget may save more or less time. A
step of level j takes

    s * (full + g * (bench(j) - full))

with a slowdown s and a gain g, for each phase. Over full that is y = s (1 + x) + d x in the
bench's own saving x = bench(j) / full - 1 <= 0, with d = s (g - 1). Each reading gives one point
(x, y), of the steps since the reading before. s and d follow by Bayesian regression: they are
normal around 1 and 0 before anything was seen, and the points of a phase have the same error.

    forgotten    u = I h,  I -= (1 - kept) u u' / h'u,  v -= (1 - kept) u h'v / h'u
    information  I += h h' / error^2,   v += h (y - h'(1, 0)) / error^2,   h = (1 + x, x)
    (s, d) = (1, 0) + I^-1 v,           g = 1 + d / s

Old points fade within `load_memory_seconds`, because servers change, but only in the direction that
the new point tells something of: what was learned of s at full lasts while the budget is lower.
At full x is 0 and only s is learned; g needs a lower level. A point may miss the line by three
errors at most: one odd reading, as of a server that swaps, is no other server. Of the two only g
is used: s also holds what the law assumes of the sizes of steps, and a server that is slower as a
whole shows in its late answers.
"""

import math
from typing import NamedTuple

# Standard deviations of s and d before anything was seen.
_SLOWDOWN_SPREAD, _GAIN_SPREAD = 0.1, 0.5
_OUTLIER_ERRORS = 3.0
# Beyond these the bench is of another machine, and no correction of it can be trusted.
_BOUNDS = (0.5, 2.0)


class Gain(NamedTuple):
    """What is known of one phase's line: I and v above."""

    i_ss: float = 1.0 / _SLOWDOWN_SPREAD**2
    i_sd: float = 0.0
    i_dd: float = 1.0 / _GAIN_SPREAD**2
    v_s: float = 0.0
    v_d: float = 0.0

    def line(self) -> tuple[float, float]:
        """Return (s, d), the most likely ones."""
        scale = self.i_ss * self.i_dd - self.i_sd**2
        s = (self.i_dd * self.v_s - self.i_sd * self.v_d) / scale
        return 1.0 + s, (self.i_ss * self.v_d - self.i_sd * self.v_s) / scale

    def factor(self) -> float:
        """Return g, within its bounds."""
        s, d = self.line()
        return min(_BOUNDS[1], max(_BOUNDS[0], 1.0 + d / s)) if s > 0 else 1.0


def seen_steps(
    gain: Gain,
    ratio: float,
    bench_ratio: float,
    *,
    error: float,
    seconds: float,
    memory_seconds: float,
) -> Gain:
    """Return what is known after a reading `seconds` after the one before it.

    `ratio` is the time of its steps over what the bench says of full, `bench_ratio` what the bench
    says of the level in force, `error` the standard deviation of the former.
    """
    x = bench_ratio - 1.0
    s, d = gain.line()
    missed = ratio - (s * (1.0 + x) + d * x)
    limit = _OUTLIER_ERRORS * error
    y = ratio - missed + min(limit, max(-limit, missed)) - (1.0 + x)
    h_s, h_d, weight = 1.0 + x, x, 1.0 / error**2
    u_s, u_d = gain.i_ss * h_s + gain.i_sd * h_d, gain.i_sd * h_s + gain.i_dd * h_d
    lost = (1.0 - math.exp(-seconds / memory_seconds)) / (h_s * u_s + h_d * u_d)
    told = h_s * gain.v_s + h_d * gain.v_d
    return Gain(
        gain.i_ss - lost * u_s * u_s + weight * h_s * h_s,
        gain.i_sd - lost * u_s * u_d + weight * h_s * h_d,
        gain.i_dd - lost * u_d * u_d + weight * h_d * h_d,
        gain.v_s - lost * u_s * told + weight * h_s * y,
        gain.v_d - lost * u_d * told + weight * h_d * y,
    )
