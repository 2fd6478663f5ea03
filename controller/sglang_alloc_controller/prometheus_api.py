"""Control story, first step, by way of Prometheus: the same series from a server's query API.

One range selector returns the raw scraped samples with their own timestamps, so that the age of a
reading is true and all histograms stay apart by series, as in the direct source. Where Prometheus'
clock is set anew, samples that it has shown before do not count as new ones.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from sglang_alloc_controller.http_fetch import HttpFetcher
from sglang_alloc_controller.samples import Reading, SourceError
from sglang_alloc_controller.series_fold import TOKENS, Labels, SeriesFold
from sglang_alloc_controller.settings import SourceSettings
from sglang_alloc_controller.sglang_metrics import SERIES

_ANSWER_MAX_BYTES = 64 * 1024 * 1024
_REMEDY = "Start Prometheus, or correct source.url: its base address, without /api."
# No clock gains so much during a reading: it was set meanwhile.
_AHEAD_SECONDS = 1.0


class _Series(NamedTuple):
    name: str
    labels: Labels
    taken_at_seconds: float
    value: float


class _Scrape(NamedTuple):
    """When the newest reading was scraped."""

    scraped_at_seconds: float
    """By Prometheus' clock."""
    taken_at_seconds: float
    """By ours."""


class PrometheusApi:
    """Reads SGLang's series from a Prometheus server."""

    def __init__(self, settings: SourceSettings, clock: Callable[[], float]) -> None:
        """Take the address; `clock` is monotonic, in seconds."""
        self._settings = settings
        self._clock = clock
        self._fetcher = HttpFetcher(settings.timeout_seconds, _ANSWER_MAX_BYTES, clock, _REMEDY)
        self.url = f"{settings.url}/api/v1/query"
        self.query = query(settings)
        self._newest = _Scrape(-math.inf, -math.inf)

    def read(self) -> Reading:
        """Read once; see `MetricsSource.read`. The reading is as old as its last scrape.

        Prometheus is asked for its own time, so that its clock need not agree with ours.
        """
        asked_at_seconds = self._clock()
        their_seconds = parse_time(self._fetcher.get_text(self.url, {"query": "time()"}))
        text = self._fetcher.get_text(self.url, {"query": self.query})
        scraped = parse_answer(text, 0.0, self._settings)
        return self._by_our_clock(scraped, asked_at_seconds - their_seconds)

    def _by_our_clock(self, scraped: Reading, offset_seconds: float) -> Reading:
        """Return a reading that was taken by Prometheus' clock; one scrape is never new twice.

        A clock that was set back passes through times that it had before, and Prometheus shows what
        it scraped then as if it were of now.
        """
        taken_at_seconds = scraped.taken_at_seconds + offset_seconds
        if taken_at_seconds > self._clock() + _AHEAD_SECONDS:
            raise SourceError(
                "Prometheus' clock was set forward while it was asked, so the age of its samples "
                "is not known. The next reading will do."
            )
        if scraped.taken_at_seconds > self._newest.scraped_at_seconds:
            self._newest = _Scrape(scraped.taken_at_seconds, taken_at_seconds)
        return replace(scraped, taken_at_seconds=self._newest.taken_at_seconds)

    def close(self) -> None:
        """Close the connection."""
        self._fetcher.close()


def query(settings: SourceSettings) -> str:
    """Return the PromQL expression that selects the last scrapes of our series."""
    names = "|".join((*SERIES, TOKENS))
    matchers = [f'__name__=~"sglang[:_]({names})"']
    if settings.selector:
        matchers.append(settings.selector)
    return f"{{{','.join(matchers)}}}[{round(settings.lookback_seconds * 1000)}ms]"


def parse_time(text: str) -> float:
    """Return what the API answered to `time()`, in seconds since the epoch."""
    result = _result(text)
    try:
        return float(result[1])
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        raise SourceError(f"Prometheus answered to time() with {text[:80]!r}.") from error


def parse_answer(text: str, offset_seconds: float, settings: SourceSettings) -> Reading:
    """Turn the API's answer into a reading; `offset_seconds` is our clock minus Prometheus'.

    A series that the newest scrape of its target lacks does not count, because its engine is gone;
    nor does a target that is half the lookback behind, because it is gone itself.

    Raises:
        SourceError: the query failed, or no engine's series are there.
    """
    series = list(_series(text))
    scraped_at: dict[str, float] = {}
    for one in series:
        target = one.labels.target
        scraped_at[target] = max(scraped_at.get(target, -math.inf), one.taken_at_seconds)
    newest_seconds = max(scraped_at.values(), default=-math.inf)
    horizon_seconds = newest_seconds - settings.lookback_seconds / 2
    fold = SeriesFold(settings)
    for one in series:
        if one.taken_at_seconds >= max(scraped_at[one.labels.target], horizon_seconds):
            fold.add(one.name, one.labels, one.value)
    if not fold.has_gauges():
        raise SourceError(
            f"Prometheus has no sglang:num_queue_reqs and sglang:num_running_reqs of the last "
            f"{settings.lookback_seconds:g} s for {{{settings.selector}}}. Check that it scrapes "
            "SGLang (--enable-metrics), source.selector and source.lookback_seconds."
        )
    oldest_seconds = min(at for at in scraped_at.values() if at >= horizon_seconds)
    return fold.reading(oldest_seconds + offset_seconds)


def _series(text: str) -> Iterable[_Series]:
    for one in _result(text):
        try:
            metric = {str(label): str(value) for label, value in one["metric"].items()}
            taken_at_seconds, value = one["values"][-1]
            name = str(metric.pop("__name__")).removeprefix("sglang").lstrip(":_")
            yield _Series(name, Labels.of(metric), float(taken_at_seconds), float(value))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(f"Prometheus answered with a series like {one!r:.120}.") from error


def _result(text: str) -> list[Any]:
    try:
        answer = json.loads(text)
        if answer["status"] == "success" and isinstance(answer["data"]["result"], list):
            return list(answer["data"]["result"])
        problem = str(answer.get("error", "no result"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"The Prometheus API answered with {text[:80]!r}, which is not its JSON. Check "
            "source.url."
        ) from error
    raise SourceError(f"The Prometheus query failed: {problem}.")
