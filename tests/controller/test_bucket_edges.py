"""Is each SLO a bucket edge? If not, which flag to start SGLang with."""

from pathlib import Path

from sglang_alloc_controller.bucket_edges import check_edges, missing_edges
from sglang_alloc_controller.samples import Reading
from sglang_alloc_controller.settings import SloSettings, SourceSettings
from sglang_alloc_controller.sglang_metrics import parse_metrics


def _reading(path: Path) -> Reading:
    return parse_metrics(path.read_text(), 0.0, SourceSettings())


def _slo(ttft: float | None, itl: float | None) -> SloSettings:
    return SloSettings(ttft_seconds=ttft, itl_seconds=itl)


def test_edges_that_are_there_are_fine(recorded: Path) -> None:
    findings = check_edges(_reading(recorded / "after.txt"), _slo(1.0, 0.05))
    assert [(one.slo, one.present) for one in findings] == [("ttft", True), ("itl", True)]


def test_a_missing_edge_is_told_with_the_flag_that_adds_it(recorded: Path) -> None:
    (sentence,) = missing_edges(_reading(recorded / "after.txt"), _slo(0.7, 0.05))
    assert "slo.ttft_seconds is 0.7, which is not a bucket edge" in sentence
    assert "--bucket-time-to-first-token 0.05 0.1 0.2 0.3 0.5 0.7 1 2 4 8," in sentence


def test_before_the_first_answer_an_edge_is_unknown_not_missing(recorded: Path) -> None:
    reading = _reading(recorded / "start.txt")
    (finding,) = [one for one in check_edges(reading, _slo(1.0, 0.07)) if one.slo == "itl"]
    assert not finding.known
    assert missing_edges(reading, _slo(1.0, 0.07)) == []


def test_a_latency_without_a_promise_needs_no_edge(recorded: Path) -> None:
    assert check_edges(_reading(recorded / "after.txt"), _slo(None, None)) == []
