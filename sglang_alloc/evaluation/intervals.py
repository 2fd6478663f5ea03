"""Offline story, judging: confidence intervals by the bootstrap, paired by window or question."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4_000
CONFIDENCE = 0.95
SEED = 0


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_interval(samples: ArrayLike) -> Interval:
    """Percentile bootstrap of the mean of samples (W,); for differences, pass paired ones.

    Samples are resampled by the same draws whatever they are, so that two intervals can be
    compared.
    """
    values = np.asarray(samples, dtype=np.float64)
    draws = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    means = values[draws].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def at_usage(
    used: Sequence[float], samples: Sequence[Sequence[float]], wanted: float
) -> NDArray[np.float64]:
    """Interpolate a rule's losses (W,) to a use that it was not measured at.

    used: the measured use (mean k, or distinct experts) of each point; samples: their losses above
    the full model. The mean is interpolated geometrically between the two nearest points, because
    losses fall about exponentially with use and a straight line would flatter the other rule; each
    sample is interpolated linearly and scaled to that mean. Outside, the nearest point counts.
    """
    order = np.argsort(used)
    xs = np.asarray(used, dtype=np.float64)[order]
    rows = np.asarray(samples, dtype=np.float64)[order]
    place = float(np.interp(wanted, xs, np.arange(len(xs))))
    below = int(place)
    above, share = min(below + 1, len(xs) - 1), place - below
    mixed: NDArray[np.float64] = rows[below] + share * (rows[above] - rows[below])
    ends = rows[below].mean(), rows[above].mean()
    if min(ends) <= 0:
        return mixed
    scaled: NDArray[np.float64] = mixed * (ends[0] ** (1 - share) * ends[1] ** share / mixed.mean())
    return scaled
