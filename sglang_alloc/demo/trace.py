"""Demo, step 2: the requests to send and when: calm, burst, calm, the same for every run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sglang_alloc.server_runs.errors import ServerRunError


class LoadPhase(NamedTuple):
    """A stretch of the trace with one arrival rate and irregular arrivals."""

    name: str
    seconds: float
    requests_per_second: float


class TracedRequest(NamedTuple):
    """One request: due `due_second` after the start, whether or not earlier ones are answered."""

    request_id: int
    phase: str
    due_second: float
    prompt: str
    output_tokens: int


@dataclass(frozen=True)
class Trace:
    """Every request in order of its due second, and the phases that they were drawn from."""

    phases: tuple[LoadPhase, ...]
    requests: tuple[TracedRequest, ...]

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def phase_bounds(self) -> list[tuple[str, float, float]]:
        """Return (name, first second, last second) of each phase."""
        ends = list(itertools.accumulate(phase.seconds for phase in self.phases))
        starts = [0.0, *ends[:-1]]
        named = zip(self.phases, starts, ends, strict=True)
        return [(phase.name, start, end) for phase, start, end in named]


def make_trace(
    texts: Sequence[str],
    phases: Sequence[LoadPhase],
    *,
    prompt_bytes: int,
    output_tokens: int,
    seed: int,
) -> Trace:
    """Draw a trace: irregular arrivals in each phase, prompts cut from `texts` in turn.

    The same arguments give the same trace on every machine. A prompt is at most `prompt_bytes`
    of UTF-8 and starts at a random place, so that no two share a prefix worth caching.
    """
    generator = random.Random(seed)
    requests = []
    arrivals = _arrivals(phases, generator)
    for index, (phase, due_second) in enumerate(arrivals):
        prompt = cut_prompt(texts[index % len(texts)], prompt_bytes, generator)
        requests.append(TracedRequest(index, phase, due_second, prompt, output_tokens))
    return Trace(tuple(phases), tuple(requests))


def cut_prompt(text: str, prompt_bytes: int, generator: random.Random) -> str:
    """Cut a random piece of at most `prompt_bytes` of UTF-8, never splitting a character."""
    if len(text) < prompt_bytes:
        raise ServerRunError(
            f"a prompt of {prompt_bytes} bytes was asked for, and the held-out text has only "
            f"{len(text)} characters: use a longer text or shorter prompts"
        )
    start = generator.randint(0, len(text) - prompt_bytes)
    piece = text[start : start + prompt_bytes].encode("utf-8")[:prompt_bytes]
    return piece.decode("utf-8", errors="ignore")


def _arrivals(phases: Sequence[LoadPhase], generator: random.Random) -> Iterator[tuple[str, float]]:
    """Yield (phase, due second): a Poisson process given its expected count in each phase.

    Fixing the count leaves the arrivals as irregular as they are, but no draw makes a burst of
    300 requests 10 % larger than planned.
    """
    start = 0.0
    for phase in phases:
        count = round(phase.seconds * phase.requests_per_second)
        offsets = sorted(generator.uniform(0.0, phase.seconds) for _ in range(count))
        for offset in offsets:
            yield phase.name, start + offset
        start += phase.seconds
