"""Control story, first step, direct: SGLang's own /metrics and /v1/loads become a reading.

The page of an 8-rank server is 0.7 MB; one compiled expression picks our few series out of it.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from sglang_alloc_controller.http_fetch import HttpFetcher, StatusError
from sglang_alloc_controller.samples import EngineLoad, Reading, SourceError
from sglang_alloc_controller.series_fold import COMPUTED_TOKENS, TOKENS, Labels, SeriesFold
from sglang_alloc_controller.settings import SourceSettings
from sglang_alloc_controller.sglang_loads import LOADS_PATH, parse_loads

# SGLang names its metrics with a colon; scrapers that speak OpenMetrics turn it into an underscore.
HISTOGRAMS = ("time_to_first_token_seconds", "inter_token_latency_seconds")
GAUGES = ("num_queue_reqs", "num_running_reqs")
# The law looks ahead with TOKENS, and does without otherwise.
SERIES = (*GAUGES, *(f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum")))

# Within one line: a page that has lost its braces would otherwise be searched to its end from each.
_LABELS = r"(?:[^\"}\n]|\"(?:[^\"\\\n]|\\.)*\")*"
# It begins with characters and not with an anchor: the search for those is four times as fast.
_LINE = re.compile(rf"\nsglang[:_]({'|'.join((*SERIES, TOKENS))})(?:\{{({_LABELS})\}})?[ \t]+(\S+)")
_LABEL = re.compile(r"\b([A-Za-z_]\w*)\s*=\s*\"((?:[^\"\\]|\\.)*)\"")
_METRICS_MAX_BYTES = 32 * 1024 * 1024
_REMEDY = "Start SGLang with --enable-metrics, or correct source.url."
# Not offered, or only with an API key: /metrics alone has to do.
_NOT_FOR_US = range(400, 500)


class _Line(NamedTuple):
    name: str
    labels: Labels
    value: str


class SGLangMetrics:
    """Reads one SGLang server's /metrics and /v1/loads by HTTP."""

    def __init__(self, settings: SourceSettings, clock: Callable[[], float]) -> None:
        """Take the address and the limits; `clock` is monotonic, in seconds."""
        self._settings = settings
        self._clock = clock
        self._fetcher = HttpFetcher(settings.timeout_seconds, _METRICS_MAX_BYTES, clock, _REMEDY)
        self.url = f"{settings.url}/metrics"

    def read(self) -> Reading:
        """Read once; see `MetricsSource.read`.

        The reading is as old as the last step of the slowest rank, or counts from when it was asked
        for where the server offers no /v1/loads.
        """
        asked_at_seconds = self._clock()
        load = self.read_load() if self._settings.loads else None
        reading = parse_metrics(self._fetcher.get_text(self.url), asked_at_seconds, self._settings)
        return reading if load is None else with_load(reading, load, self._settings)

    def read_load(self) -> EngineLoad | None:
        """Read /v1/loads once; None: this server does not offer it, or not to us.

        Raises:
            SourceError: no answer in time, or not the JSON that was expected.
        """
        try:
            return parse_loads(self._fetcher.get_text(f"{self._settings.url}{LOADS_PATH}"))
        except StatusError as error:
            if error.status in _NOT_FOR_US:
                return None
            raise

    def missing_series(self) -> list[str]:
        """Return the series that the server does not show; see the function of this name.

        Raises:
            SourceError: the page cannot be read.
        """
        return missing_series(self._fetcher.get_text(self.url))

    def close(self) -> None:
        """Close the connection."""
        self._fetcher.close()


def parse_metrics(text: str, taken_at_seconds: float, settings: SourceSettings) -> Reading:
    """Turn a metrics page into a reading.

    Raises:
        SourceError: it is not SGLang's, or a value in it is not a number.
    """
    fold = SeriesFold(settings)
    for name, labels, value in _lines(text):
        try:
            fold.add(name, labels, float(value))
        except ValueError as error:
            raise SourceError(
                f"The metrics have {value!r} for sglang:{name}, where a number belongs."
            ) from error
    if not fold.has_gauges():
        raise SourceError(
            "The metrics hold no sglang:num_queue_reqs and sglang:num_running_reqs. Start SGLang "
            "with --enable-metrics, or check the address and source.model_name."
        )
    return fold.reading(taken_at_seconds)


def with_load(reading: Reading, load: EngineLoad, settings: SourceSettings) -> Reading:
    """Return the reading with the load's age, and with its queue unless priorities are counted.

    The load does not tell priorities apart, and SGLang's gauges in /metrics stay where they were
    while an engine is idle.
    """
    taken_at_seconds = reading.taken_at_seconds - load.age_seconds
    if settings.priorities is not None and reading.priorities:
        return replace(
            reading,
            taken_at_seconds=taken_at_seconds,
            load=load,
            rank_times=load.rank_times,
        )
    return replace(
        reading,
        taken_at_seconds=taken_at_seconds,
        queue_requests=load.queue_requests,
        running_requests=load.running_requests,
        load=load,
        rank_times=load.rank_times,
    )


def missing_series(metrics_text: str) -> list[str]:
    """Return the series that the controller reads and this page lacks, as `sglang:NAME`.

    The latency histograms appear with the first streamed answer of two tokens or more, the computed
    prompt tokens with the first prompt.
    """
    found = {
        name
        for name, labels, _ in _lines(metrics_text)
        if name != TOKENS or labels.mode == COMPUTED_TOKENS
    }
    missing = [f"sglang:{name}" for name in SERIES if name not in found]
    return (
        missing if TOKENS in found else [*missing, f'sglang:{TOKENS}{{mode="{COMPUTED_TOKENS}"}}']
    )


def _lines(text: str) -> Iterable[_Line]:
    for match in _LINE.finditer(f"\n{text}"):
        name, labels, value = match.groups()
        try:
            parsed = _parsed_labels(labels or "")
        except ValueError as error:
            raise SourceError(
                f"The metrics have sglang:{name}{{{labels:.120}}}, whose bucket edge is no number."
            ) from error
        yield _Line(name, parsed, value)


@lru_cache(maxsize=16_384)
def _parsed_labels(text: str) -> Labels:
    """Parse a label set; the same few come with every reading, so each is parsed once."""
    return Labels.of(dict(_LABEL.findall(text)))
