"""Control story, before the first step: is each SLO a bucket edge of the server's histograms?"""

import math
from typing import NamedTuple

from sglang_alloc_controller.histogram_window import has_edge
from sglang_alloc_controller.samples import Reading, Slo
from sglang_alloc_controller.settings import SloSettings

_FLAGS: dict[Slo, str] = {
    "ttft": "--bucket-time-to-first-token",
    "itl": "--bucket-inter-token-latency",
}


class EdgeFinding(NamedTuple):
    """What is known of one SLO's edge."""

    slo: Slo
    known: bool
    """False: the histogram is not there before the first request, so nothing can be said."""
    present: bool
    sentence: str


def check_edges(reading: Reading, slo: SloSettings) -> list[EdgeFinding]:
    """Look for the edge of each promised latency; a missing one makes its share a guess."""
    promised: dict[Slo, float | None] = {"ttft": slo.ttft_seconds, "itl": slo.itl_seconds}
    return [
        _finding(name, seconds, reading.edges.get(name, frozenset()))
        for name, seconds in promised.items()
        if seconds is not None
    ]


def missing_edges(reading: Reading, slo: SloSettings) -> list[str]:
    """Return a sentence for each SLO that is known not to be an edge."""
    return [
        finding.sentence
        for finding in check_edges(reading, slo)
        if finding.known and not finding.present
    ]


def _finding(name: Slo, seconds: float, edges: frozenset[float]) -> EdgeFinding:
    if not edges:
        sentence = (
            f"SGLang shows no {name.upper()} histogram before its first streamed answer of two "
            f"tokens or more; that {seconds:g} s is one of its buckets is not known yet."
        )
        return EdgeFinding(name, False, False, sentence)
    if has_edge(edges, seconds):
        sentence = f"slo.{name}_seconds {seconds:g} is a bucket edge of the server."
        return EdgeFinding(name, True, True, sentence)
    finite = sorted({edge for edge in edges if not math.isinf(edge)} | {seconds})
    sentence = (
        f"slo.{name}_seconds is {seconds:g}, which is not a bucket edge of the server "
        f"({_listed(sorted(edges))}). Start SGLang with {_FLAGS[name]} {_listed(finite)}"
        ", or choose one of its edges."
    )
    return EdgeFinding(name, True, False, sentence)


def _listed(edges: list[float]) -> str:
    return " ".join(f"{edge:g}" for edge in edges if not math.isinf(edge))
