"""Control story, third step, forward: what arrives, and since when it is that load. Pure.

Arrivals count as Poisson, prompt tokens as gamma distributed with a known shape. The load that is
believed to last since some time is divided at each window: n1 requests in the last T1 seconds, n0
in the T0 seconds before. The evidence for a change there is the logarithm of the likelihood ratio
of two loads to one (a GLR detector), in nats:

    rate   n1 * ln(r1 / r) + n0 * ln(r0 / r),             r1 = n1 / T1, r0 = n0 / T0, r = all / all
    size   shape * (n1 * ln(m / m1) + n0 * ln(m / m0)),    mean prompts m1, m0, m = of all

Each counts as negative where it says less work, and only their sum is evidence: more requests with
shorter prompts are the same work. A change needs load_change_nats + ln(age / 30 s), of an age of 10
minutes at least: a load that lasted long is less likely to change just now. Where loads kept
changing it needs load_change_nats alone. A fall needs 1.6 times as much, since a needless return
brings late answers and a needless cut only loss. The window with most evidence beyond that dates
the change: from then on only what came after it counts. The rate is the mean since the change (at
most the last 300 s), drawn to the rate before as if one more second had been seen at it: what shows
a change exaggerates it. Beside it stands the rate of the last 100 s, which late answers are charged
to: under a load that rises slowly the longer mean is too small, and would have the server blamed
for what the load did. Whether the rate rises or falls steadily is told by a straight line through
the counts n_i of the pieces between windows, of T_i seconds, t_i seconds from the middle of all:

    trend  (sum t_i (n_i - r T_i))^2 / (2 r sum T_i t_i^2)    half a nat in the mean if it does not
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.load_history import LoadWindow

# Prompts count as gamma distributed with this shape: a standard deviation of 0.63 of their mean.
_SIZE_SHAPE = 2.5
_REQUESTS_MIN = 3.0
# Neither side of a change is shorter.
_SIDE_SECONDS_MIN = 2.5
_BEFORE_SECONDS = 1.0
# A needless cut costs little, a needless return late answers: a fall needs more evidence.
_FALL_FACTOR = 1.6
# A load that has lasted is less likely to change now: odds against it grow with its age.
_RESTLESS_SECONDS = 30.0
# A load that is younger counts as this old: at less, clumps in the first minutes of a load were
# taken for another one and cost up to four changes.
_YOUNGEST_SECONDS = 600.0
# What is longer ago than this does not count even if nothing is seen to have changed.
_SPAN_SECONDS_MAX = 300.0
# Over less than this no trend is told from clumps.
_TREND_SECONDS_MIN = 100.0
# Late answers are charged to the rate of so long: half of it made the law too sure of the server.
_RECENT_SECONDS = 100.0
# Windows and ages are sums of the same times; a boundary missed by rounding alone counts as met.
_ROUNDING_SECONDS = 0.1
# Tokens come after their request's first one: a mean over less than this would be too small.
_OUTPUT_SECONDS = 15.0

_seconds = attrgetter("seconds")


class Load(NamedTuple):
    """What arrives."""

    rate_per_second: float
    """Requests per second."""
    variance: float
    """Of that estimate."""
    prefill_tokens: float
    """Prompt tokens to compute, per request."""
    decode_tokens: float
    """Tokens to generate after the first, per request."""
    seconds: float
    """Time over which the rate was counted."""
    recent_per_second: float
    """Requests per second of the last minute or two, of this load only."""
    trend_nats: float
    """Evidence that the rate has risen or fallen steadily ever since the load is what it is."""


def within_age(windows: Sequence[LoadWindow], age_seconds: float) -> Sequence[LoadWindow]:
    """Return the windows (shortest first) that begin after a change so long ago; one at least."""
    count = bisect_right(windows, age_seconds + _ROUNDING_SECONDS, key=_seconds)
    return windows[: max(1, count)]


def changed_window(
    windows: Sequence[LoadWindow], age_seconds: float, law: LawSettings
) -> LoadWindow | None:
    """Return the window that begins where the load changed; None: it did not.

    `windows` are of the load that is believed to last, the shortest first.
    """
    if len(windows) < 2:
        return None
    whole = windows[-1]
    best, most = None, 0.0
    asked = law.load_change_nats
    if age_seconds > 0:
        asked += math.log(max(_YOUNGEST_SECONDS, age_seconds) / _RESTLESS_SECONDS)
    for window in windows[:-1]:
        if min(window.seconds, whole.seconds - window.seconds) < _SIDE_SECONDS_MIN:
            continue
        if _evidence_bound(window, whole) <= asked:
            continue
        evidence = _rate_evidence(window, whole) + _size_evidence(window, whole)
        enough = asked * (_FALL_FACTOR if evidence < 0 else 1.0)
        evidence = abs(evidence) - enough
        if evidence > most:
            best, most = window, evidence
    return best


def load_of(
    windows: Sequence[LoadWindow], before_per_second: float | None, before: "Load | None"
) -> Load | None:
    """Return the load of the windows since it changed; None: too few requests ever."""
    whole = within_age(windows, _SPAN_SECONDS_MAX)[-1]
    recent = within_age(windows, _RECENT_SECONDS)[-1]
    seconds, arrivals = whole.seconds, whole.arrivals
    if before_per_second is not None:
        seconds, arrivals = (
            seconds + _BEFORE_SECONDS,
            arrivals + _BEFORE_SECONDS * before_per_second,
        )
    if whole.requests >= _REQUESTS_MIN:
        sizes = whole.prefill_tokens / whole.requests, whole.decode_tokens / whole.requests
        if before is not None and whole.seconds < _OUTPUT_SECONDS:
            sizes = sizes[0], before.decode_tokens
    elif before is not None:
        sizes = before.prefill_tokens, before.decode_tokens
    else:
        return None
    rate = arrivals / seconds
    variance = max(arrivals, 1.0) / seconds**2
    recent_per_second = recent.arrivals / recent.seconds
    return Load(rate, variance, *sizes, whole.seconds, recent_per_second, trend_nats(windows))


def trend_nats(windows: Sequence[LoadWindow]) -> float:
    """Return the evidence that the rate rises or falls steadily over the windows, in nats."""
    whole = windows[-1]
    if whole.arrivals <= 0 or whole.seconds < _TREND_SECONDS_MIN:
        return 0.0
    mean, middle = whole.arrivals / whole.seconds, whole.seconds / 2
    moment, spread, newer = 0.0, 0.0, LoadWindow(0.0, 0.0, 0.0, 0.0, 0.0)
    for older in windows:
        seconds = older.seconds - newer.seconds
        from_middle = middle - (older.seconds + newer.seconds) / 2
        moment += from_middle * (older.arrivals - newer.arrivals - mean * seconds)
        spread += seconds * from_middle**2
        newer = older
    return moment**2 / spread / (2.0 * mean) if spread > 0 else 0.0


def _evidence_bound(window: LoadWindow, whole: LoadWindow) -> float:
    """Return what the evidence cannot exceed, without a logarithm: ln x <= x - 1.

    Most windows of a load that lasts fall short of it, and all of them are looked at each time.
    """
    seconds, arrivals, requests, tokens, _ = window
    share, all_arrivals = seconds / whole.seconds, max(arrivals, whole.arrivals)
    expected, expected_before = all_arrivals * share, all_arrivals * (1.0 - share)
    if expected <= 0.0:
        return math.inf
    more = (arrivals - expected) ** 2
    bound = more / expected + more / expected_before
    before, tokens_before = whole.requests - requests, whole.prefill_tokens - tokens
    if min(before, requests) >= _REQUESTS_MIN and min(tokens, tokens_before) > 0:
        mean = whole.prefill_tokens / whole.requests
        of_sizes = requests * (mean * requests / tokens - 1.0)
        of_sizes += before * (mean * before / tokens_before - 1.0)
        bound += _SIZE_SHAPE * of_sizes
    return bound


def _rate_evidence(window: LoadWindow, whole: LoadWindow) -> float:
    arrivals, seconds, whole_seconds = window.arrivals, window.seconds, whole.seconds
    before = max(0.0, whole.arrivals - arrivals)
    rate = (arrivals + before) / whole_seconds
    nats = _part(arrivals, seconds, rate) + _part(before, whole_seconds - seconds, rate)
    return nats if arrivals > seconds * rate else -nats


def _part(arrivals: float, seconds: float, rate: float) -> float:
    return arrivals * math.log(arrivals / (seconds * rate)) if arrivals > 0 else 0.0


def _size_evidence(window: LoadWindow, whole: LoadWindow) -> float:
    requests, whole_requests = window.requests, whole.requests
    before = whole_requests - requests
    if before < _REQUESTS_MIN or requests < _REQUESTS_MIN:
        return 0.0
    mean = whole.prefill_tokens / whole_requests
    now = window.prefill_tokens / requests
    then = (whole.prefill_tokens - window.prefill_tokens) / before
    if now <= 0 or then <= 0:
        return 0.0
    nats = _SIZE_SHAPE * (requests * math.log(mean / now) + before * math.log(mean / then))
    return nats if now > mean else -nats
