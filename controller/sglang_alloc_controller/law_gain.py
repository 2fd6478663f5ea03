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
errors at most: one odd reading, as of a server that swaps, is no other server. But where points
miss it on one side, by twice their error in a mean over ten readings, the server has become
another: s is in doubt again, its variance growing by 1 and that of d with it, and follows the next
point wherever that is. What a budget saves, g, counts as before: it is a property of kernels, while
a clock that falls, a neighbour, or a bench of another machine makes all steps slower at once.

A part of s is what the law assumes of the sizes of steps, what longer contexts than the bench's add
to a decode step, and that SGLang counts a decode step that is still under way with the prefill step
behind it. So what counts is the s that is nearer to 1 of both phases, if both are above or below 1;
and for nothing within a band, up to b and down to 1 / b, where a server that is a little slower
shows in late answers; for (s / b)^2 or (s b)^2 beyond it, and for s itself from b^2 on, and down
from 1 / b^2.
"""

import math
from typing import NamedTuple

# Standard deviations of s and d before anything was seen.
_SLOWDOWN_SPREAD, _GAIN_SPREAD = 0.1, 0.5
_OUTLIER_ERRORS = 3.0
# Beyond these the bench is of another machine, and no correction of it can be trusted.
_BOUNDS = (0.5, 2.0)
# The band is as wide as what step sizes were seen to do (0.98 to 1.13 in simulated runs on the
# bench's own plant, of which 1.0 to 1.1 was true). Beyond the bounds no step time is believed.
_BAND, _SLOWDOWN_BOUNDS = 1.15, (0.25, 8.0)
# Misses on one side: their mean is over so many readings, and may be so many errors.
_BIAS_READINGS, _BIAS_ERRORS = 10.0, 2.0
# Standard deviation of the s of another server, around that of the one before.
_OTHER_SPREAD = 1.0


class Gain(NamedTuple):
    """What is known of one phase's line: I and v above."""

    i_ss: float = 1.0 / _SLOWDOWN_SPREAD**2
    i_sd: float = 0.0
    i_dd: float = 1.0 / _GAIN_SPREAD**2
    v_s: float = 0.0
    v_d: float = 0.0
    bias: float = 0.0
    """Mean of how far the last points missed the line, in errors."""

    def line(self) -> tuple[float, float]:
        """Return (s, d), the most likely ones."""
        scale = self.i_ss * self.i_dd - self.i_sd**2
        s = (self.i_dd * self.v_s - self.i_sd * self.v_d) / scale
        return 1.0 + s, (self.i_ss * self.v_d - self.i_sd * self.v_s) / scale

    def factor(self) -> float:
        """Return g, within its bounds."""
        s, d = self.line()
        return min(_BOUNDS[1], max(_BOUNDS[0], 1.0 + d / s)) if s > 0 else 1.0

    def of_another_server(self) -> "Gain":
        """Return the same line with s in doubt, and d beside it: g stays what it is, v follows."""
        scale, beside = self.i_ss * self.i_dd - self.i_sd**2, self.factor() - 1.0
        ss = self.i_dd / scale + _OTHER_SPREAD**2
        sd = -self.i_sd / scale + _OTHER_SPREAD**2 * beside
        dd = self.i_ss / scale + (_OTHER_SPREAD * beside) ** 2
        scale = ss * dd - sd**2
        i_ss, i_sd, i_dd = dd / scale, -sd / scale, ss / scale
        s, d = self.line()
        return Gain(i_ss, i_sd, i_dd, i_ss * (s - 1.0) + i_sd * d, i_sd * (s - 1.0) + i_dd * d)


def slowdown_of(*phases: Gain) -> float:
    """Return how much longer than by the bench the steps of all phases take, 1 within the band."""
    seen = [gain.line()[0] for gain in phases]
    if min(seen) > 1.0:
        s = min(seen)
        return min(s, max(1.0, (s / _BAND) ** 2), _SLOWDOWN_BOUNDS[1])
    s = min(1.0, max(seen))
    return max(s, min(1.0, (s * _BAND) ** 2), _SLOWDOWN_BOUNDS[0])


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
    clipped = min(limit, max(-limit, missed))
    bias = gain.bias + (clipped / error - gain.bias) / _BIAS_READINGS
    if abs(bias) > _BIAS_ERRORS:
        gain, clipped, bias = gain.of_another_server(), missed, 0.0
    y = ratio - missed + clipped - (1.0 + x)
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
        bias,
    )
