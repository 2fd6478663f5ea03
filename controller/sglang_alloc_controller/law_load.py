"""Control story, third step, forward: how many requests arrive, surely and likely. Pure.

Arrivals count as Poisson. A window of T seconds with n arrivals says that the rate is surely within

    (n - z * sqrt(n)) / T   and   (n + z * sqrt(n) + z^2) / T

with z such that this is wrong about `load_false_alarms` times an hour. From the shortest window on,
these intervals are intersected until one contradicts the others: that window reaches back into
another load, and so do the longer ones. A load that just changed is thus known roughly after
seconds, and one that stays better and better.

The work of a request (prompt tokens to compute, tokens to generate) is taken over the longest
window that agreed, and over a shorter one where that differs by more than chance.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

from sglang_alloc_controller.load_history import LoadWindow
from sglang_alloc_controller.settings import LawSettings

# Standard deviation of the sizes of single requests over their mean, and the sigmas by which the
# mean of a window must differ to count as another mix.
_SIZE_SPREAD, _SIZE_SIGMAS = 0.8, 4.0
_REQUESTS_MIN = 4.0
# A likely change is one by so many sigmas; a sure one is rarer than `load_false_alarms`.
_LIKELY_SIGMAS = 2.0
# Another mix shows in so many requests and seconds: a request's tokens come after its first one.
_MIX_REQUESTS_MIN, _MIX_SECONDS_MIN = 24.0, 12.0
_HOUR_SECONDS = 3600.0


class Load(NamedTuple):
    """What arrives."""

    low_per_second: float
    """Requests per second that surely come at least."""
    likely_per_second: float
    high_per_second: float
    mean_per_second: float
    """Mean rate since the load is what it is."""
    prefill_tokens: float
    """Prompt tokens to compute, per request."""
    decode_tokens: float
    """Tokens to generate after the first, per request."""
    same_seconds: float
    """For how long it has been this load, as far as is known."""
    steady_seconds: float
    """The same, with softer doubts counting."""


def load_of(windows: Sequence[LoadWindow], law: LawSettings) -> Load | None:
    """Return the load that the windows (shortest first) agree on; None: too few requests."""
    if not windows:
        return None
    low, high, agreed = _agreed(windows, law.load_false_alarms, 0.0)
    same = windows[: max(1, agreed)]
    known = [one for one in same if one.requests >= _REQUESTS_MIN]
    if not known:
        known = [one for one in windows if one.requests >= _REQUESTS_MIN][:1]
    if not known:
        return None
    steady = _steady(same)
    likely = steady.arrivals / steady.seconds
    return Load(
        low,
        min(high, max(low, likely)),
        high,
        same[-1].arrivals / same[-1].seconds,
        _per_request(known, lambda window: window.prefill_tokens),
        _per_request(known, lambda window: window.decode_tokens),
        _same_seconds(windows, len(same)),
        steady.seconds,
    )


def _agreed(
    windows: Sequence[LoadWindow], false_alarms: float, sigmas: float
) -> tuple[float, float, int]:
    """Return the rates that all of the first windows allow, and how many windows those are."""
    low, high, agreed = 0.0, math.inf, 0
    for window in windows:
        lower, upper = _bounds(window, sigmas or _sigmas(window, false_alarms))
        if max(low, lower) > min(high, upper):
            break
        low, high, agreed = max(low, lower), min(high, upper), agreed + 1
    return low, high, agreed


def _same_seconds(windows: Sequence[LoadWindow], agreed: int) -> float:
    """Return for how long it has been this load: since what differs most from the one before."""
    if agreed == len(windows):
        return windows[-1].seconds
    before = windows[agreed].arrivals / windows[agreed].seconds

    def doubt(window: LoadWindow) -> float:
        expected = before * window.seconds
        return abs(window.arrivals - expected) / math.sqrt(max(1.0, expected))

    return max(windows[:agreed], key=doubt).seconds


def _steady(windows: Sequence[LoadWindow]) -> LoadWindow:
    """Return the longest window that nothing newer speaks against, not even softly."""
    _, _, agreed = _agreed(windows, 0.0, _LIKELY_SIGMAS)
    return windows[max(1, agreed) - 1]


def _sigmas(window: LoadWindow, false_alarms: float) -> float:
    return NormalDist().inv_cdf(1.0 - min(0.4, false_alarms * window.seconds / _HOUR_SECONDS))


def _bounds(window: LoadWindow, sigmas: float) -> tuple[float, float]:
    middle = window.arrivals + sigmas**2 / 2
    spread = sigmas * math.sqrt(window.arrivals + sigmas**2 / 4)
    return (middle - spread) / window.seconds, (middle + spread) / window.seconds


def _per_request(windows: Sequence[LoadWindow], amount: Callable[[LoadWindow], float]) -> float:
    mean = amount(windows[-1]) / windows[-1].requests
    for window in reversed(windows[:-1]):
        if window.requests < _MIX_REQUESTS_MIN or window.seconds < _MIX_SECONDS_MIN:
            break
        found = amount(window) / window.requests
        if abs(found - mean) > _SIZE_SIGMAS * _SIZE_SPREAD / math.sqrt(window.requests) * mean:
            mean = found
    return mean
