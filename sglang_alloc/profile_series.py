"""Offline story, profiling: one series of probes over chunks of windows, stopping when sure enough.

A series is a mode and a phase. `decode`: prefix at full quality, continuation under the probe.
`prefill`: prefix under the probe, continuation at full quality, so that a reduced prefix costs what
its cached states do to what follows. Mode `union` decodes its continuations token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang_alloc.allocation_mode import Phase
from sglang_alloc.profile_engine import ProfiledServer, Scored
from sglang_alloc.profile_journal import Entry, ProfileJournal
from sglang_alloc.profile_plan import ProbePlan
from sglang_alloc.profile_settings import ProfileSettings
from sglang_alloc.profile_windows import Window

TOP_TOKENS = 20  # of a position, for the metric kl
# Fewer windows than this give no standard error to stop by.
LEAST_WINDOWS = 8

OnTokens = Callable[[int, int], None]  # (tokens forwarded, tokens still to come at most)


@dataclass
class Series:
    """A mode and phase under measurement; what was measured lives in the journal."""

    name: str
    phase: Phase
    plan: ProbePlan
    settings: ProfileSettings
    windows: Sequence[Window]
    journal: ProfileJournal

    @property
    def chunks(self) -> list[Sequence[Window]]:
        """The windows, `chunk_windows` at a time."""
        size = self.settings.chunk_windows
        return [self.windows[i : i + size] for i in range(0, len(self.windows), size)]

    @property
    def by_steps(self) -> bool:
        """Whether continuations are decoded token by token."""
        return self.name.startswith("union")

    def run(self, server: ProfiledServer, on_tokens: OnTokens) -> None:
        """Measure every chunk under every probe that is not sure yet."""
        for number, chunk in enumerate(self.chunks):
            probes = [self.plan.full_row, *self.unsure(number)]
            missing = [p for p in probes if self.journal.find(self.name, p, number) is None]
            if not missing:
                continue
            measure = _ChunkMeasurement(self, server, chunk)
            for probe in missing:
                scored = measure.probe(probe)
                entry = Entry(self.name, probe, number, scored.losses, scored.forward_tokens)
                self.journal.add(entry)
                on_tokens(scored.forward_tokens, self.tokens_left(number))

    def unsure(self, chunk: int) -> list[int]:
        """Return the probes that chunk number `chunk` is to be measured under."""
        return [p for p in self.plan.probes if not self._is_sure(p, chunk)]

    def tokens_left(self, chunk: int) -> int:
        """Return the most tokens that the chunks after `chunk` can take."""
        return len(self.unsure(chunk + 1)) * sum(map(self.probe_tokens, self.chunks[chunk + 1 :]))

    def probe_tokens(self, chunk: Sequence[Window]) -> int:
        """Return the tokens that one probe forwards for a chunk."""
        prefix = len(chunk) * self.settings.prefix_tokens
        if self.by_steps:
            return prefix + len(chunk) * self.settings.union_steps
        continuation = len(chunk) * (self.settings.continuation_tokens + 1)
        return continuation if self.phase == "decode" else prefix + continuation

    def increases(self, probe: int, chunks: int | None = None) -> npt.NDArray[np.float64]:
        """Return each measured window's loss above the full model's, of the first `chunks`."""
        found = []
        for number in range(len(self.chunks) if chunks is None else chunks):
            entry = self.journal.find(self.name, probe, number)
            full = self.journal.find(self.name, self.plan.full_row, number)
            if entry is None or full is None:
                break
            found.append(np.subtract(entry.losses, full.losses))
        return np.concatenate(found) if found else np.zeros(0)

    def losses(self) -> npt.NDArray[np.float64]:
        """Return each row's mean loss (P,) above the full model, in the metric's unit.

        Rows that are not measured are NaN.
        """
        found = np.full(len(self.plan.rows), np.nan)
        rows = [*self.plan.probes, self.plan.full_row]
        found[rows] = [self.increases(probe).mean() for probe in rows]
        if self.settings.metric != "perplexity":
            return found
        full = math.exp(self.full_loss())
        perplexities: npt.NDArray[np.float64] = full * np.exp(found) - full
        return perplexities

    def forward_tokens(self) -> int:
        """Return the tokens that all measurements of the series forwarded."""
        mine = (e for e in self.journal.entries.values() if e.series == self.name)
        return sum(entry.forward_tokens for entry in mine)

    def _is_sure(self, probe: int, chunks: int) -> bool:
        increases = self.increases(probe, chunks)
        if len(increases) < LEAST_WINDOWS:
            return False
        error = increases.std(ddof=1) / math.sqrt(len(increases))
        allowed = max(
            self.settings.absolute_error_nats, self.settings.relative_error * abs(increases.mean())
        )
        return bool(error <= allowed)

    def full_loss(self) -> float:
        """Return the full model's mean loss in nats per token (0 in the metric kl)."""
        return self._mean(self.plan.full_row)

    def _mean(self, probe: int) -> float:
        entries = [self.journal.find(self.name, probe, n) for n in range(len(self.chunks))]
        return float(np.concatenate([e.losses for e in entries if e is not None]).mean())


class _ChunkMeasurement:
    """What the server's prefix cache holds while one chunk is measured."""

    def __init__(self, series: Series, server: ProfiledServer, chunk: Sequence[Window]) -> None:
        self._series, self._server, self._chunk = series, server, chunk
        self._full = series.plan.full_row
        self._top = TOP_TOKENS if series.settings.metric == "kl" else 0
        self._prefixed_by: int | None = None
        self._reference: Scored | None = None

    def probe(self, probe: int) -> Scored:
        """Return the chunk's losses under a probe, in the metric, and what it cost."""
        if self._series.by_steps:
            return self._decoded(probe)
        reference_tokens = 0
        if self._top and self._reference is None:
            self._reference = self._scored(self._full, self._full)
            reference_tokens = self._reference.forward_tokens
        prefix, continuation = (
            (self._full, probe) if self._series.phase == "decode" else (probe, self._full)
        )
        scored = self._scored(prefix, continuation)
        if self._reference is None:
            return scored
        pairs = zip(self._reference.top_logprobs, scored.top_logprobs, strict=True)
        losses = tuple(mean_divergence(full, found) for full, found in pairs)
        return Scored(losses, scored.forward_tokens + reference_tokens)

    def _scored(self, prefix_probe: int, probe: int) -> Scored:
        tokens = self._prefix(prefix_probe)
        self._server.set_probe(probe)
        scored = self._server.score(self._chunk, self._top)
        return scored._replace(forward_tokens=scored.forward_tokens + tokens)

    def _prefix(self, probe: int) -> int:
        """Have the prefixes in the cache, computed under `probe`; return the tokens it took."""
        if self._prefixed_by == probe:
            return 0
        self._server.flush()
        self._server.set_probe(probe)
        self._prefixed_by = probe
        return self._server.prefill(self._chunk)

    def _decoded(self, probe: int) -> Scored:
        self._prefixed_by = None  # an earlier probe's tokens are in the cache behind them
        tokens = self._prefix(self._full)
        self._server.set_probe(probe)
        losses = np.zeros(len(self._chunk))
        steps = self._series.settings.union_steps
        for step in range(steps):
            prefixes = [[*w.prefix, *w.continuation[:step]] for w in self._chunk]
            scored = self._server.next_losses(prefixes, [w.continuation[step] for w in self._chunk])
            losses += np.array(scored.losses) / steps
            tokens += scored.forward_tokens
        return Scored(tuple(losses.tolist()), tokens)


def mean_divergence(full: Sequence[dict[int, float]], found: Sequence[dict[int, float]]) -> float:
    """Return the mean KL divergence of `found` from `full` over positions, in nats.

    It is over the full model's likeliest tokens and one class for all the others, so it is at most
    the true one. A token that is not among `found`'s likeliest is taken to be as likely as the
    last of those.
    """
    return float(np.mean([_divergence(*pair) for pair in zip(full, found, strict=True)]))


def _divergence(full: dict[int, float], found: dict[int, float]) -> float:
    least = min(found.values())
    p = np.exp(np.array(list(full.values())))
    q = np.exp(np.array([found.get(token, least) for token in full]))
    p = np.append(p, max(1.0 - p.sum(), 1e-12))
    q = np.append(q, max(1.0 - q.sum(), 1e-12))
    return float((p * np.log(p / q)).sum())
