"""Offline story, calibrating: how scores are spread in each layer, in bins of equal ratio.

A threshold is a quantile of the scores that are not their token's best: those slots compete, while
the best one always stays. Bins are 1/64 octave wide (1.1 %), which is what a threshold read off
them can be wrong by.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BINS_PER_OCTAVE = 64
LOWEST_OCTAVE, HIGHEST_OCTAVE = -40, 24
NUM_BINS = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE


def threshold_of_quota(counts: npt.NDArray[np.int64], tokens: int, quota: float) -> float:
    """Return the score at which `tokens` tokens keep `quota` slots on average.

    `counts` (NUM_BINS,) are the slots that are not their token's best. Within a bin slots are taken
    to be spread evenly. The smallest quota is 1, the best slot alone; a quota that all slots
    together do not reach gives 0, which keeps everything.
    """
    wanted = (quota - 1.0) * tokens
    total = int(counts.sum())
    if wanted >= total:
        return 0.0
    if wanted <= 0:
        return float(np.finfo(np.float32).max)
    at_least = counts[::-1].cumsum()[::-1]  # slots in this bin or above
    place = int(np.flatnonzero(at_least >= wanted)[-1])
    above = int(at_least[place] - counts[place])
    into = (wanted - above) / counts[place]
    return float(2.0 ** (LOWEST_OCTAVE + (place + 1 - into) / BINS_PER_OCTAVE))


def kept_on_average(counts: npt.NDArray[np.int64], tokens: int, threshold: float) -> float:
    """Return the mean slots that a token keeps under `threshold`, its best one included."""
    if threshold <= 0:
        return 1.0 + float(counts.sum()) / tokens
    place = (np.log2(threshold) - LOWEST_OCTAVE) * BINS_PER_OCTAVE
    bins = np.arange(NUM_BINS)
    shares = np.clip(bins + 1 - place, 0.0, 1.0)
    return 1.0 + float((counts * shares).sum()) / tokens
