"""The demo's report: the keys that others read, and a page that holds its plots."""

import html
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from demo_runs import (
    make_controlled_run,
    make_full_run,
    make_record,
    make_result,
    make_run,
    make_usual_result,
)

from sglang_alloc.demo.report import build_report, without_nan, write_report
from sglang_alloc.demo.verdict import DRIFT_BOUND_RATIO, drift, verdict

RUN_KEYS = {
    "slo_attainment_ratio",
    "slo_attainment_ratio_by_phase",
    "requests",
    "errors",
    "ttft_seconds",
    "itl_seconds",
    "queue_requests",
    "throughput_tokens_per_second",
    "mean_prefill_budget",
    "mean_decode_budget",
    "heldout_nll",
    "heldout_nll_full",
    "budget_changes",
    "calm_tokens_ratio",
    "mean_budget_in_busy_steps",
    "mean_budget_in_calm_steps",
}


def _runs(**controlled: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    report = build_report(make_usual_result())
    return report["full_before"], report["full_after"], report["controlled"] | controlled


def test_report_json_has_the_keys_that_others_read(tmp_path: Path) -> None:
    write_report(make_usual_result(), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {"full_before", "full_after", "drift"} <= set(report)
    assert {"full", "controlled", "machine", "versions", "slo", "load"} <= set(report)
    assert set(report["full"]) >= RUN_KEYS
    assert set(report["controlled"]) >= RUN_KEYS
    assert report["full"]["slo_attainment_ratio"] == pytest.approx(2 / 3)
    assert report["controlled"]["slo_attainment_ratio"] == 1.0


def test_losses_are_at_the_budgets_used_and_at_full() -> None:
    full, after, controlled = _runs()
    assert after["heldout_nll"] == full["heldout_nll"]
    assert full["heldout_nll"] == full["heldout_nll_full"] == pytest.approx(1.2)
    assert controlled["heldout_nll"] == pytest.approx(0.5 * 1.2 + 0.5 * 1.4)
    assert controlled["heldout_nll_full"] == pytest.approx(1.2)


def test_the_page_stands_alone_and_holds_its_plots(tmp_path: Path) -> None:
    write_report(make_usual_result(), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    timeline, distribution = drawings
    for text in ("prefill budget", "decode budget", "calm steps", "busy steps"):
        assert text in timeline
    for text in ("prefill budget", "requests waiting", "burst", "SLO 1 s", "controlled"):
        assert text in timeline
    assert "inter-token latency" in distribution
    assert not re.search(r"(src|href)=.https?:", page)


def test_the_report_says_what_calm_steps_are_and_what_they_served(tmp_path: Path) -> None:
    report = write_report(make_usual_result(), tmp_path)
    sentence = report["calm_steps"]["sentence"]
    assert "A step is calm if no request is left waiting for it to end" in sentence
    assert "calm steps read 66.7% of the prompts' tokens and wrote 66.7%" in sentence
    assert "their mean budget was 40.0 in prefill and 40.0 in decode" in sentence
    assert "that of busy steps 20.0 and 30.0" in sentence
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.escape(sentence) in page
    row = re.search(r"<tr><td>decode budget in busy steps, mean</td>(.*?)</tr>", page)
    assert row is not None
    assert row[1] == "<td>-</td><td>-</td><td>30.0</td>"


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    write_report(make_usual_result(model="modèle <b>&</b> 模型"), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "modèle &lt;b&gt;&amp;&lt;/b&gt; 模型" in page
    assert "<b>" not in page


def test_a_run_without_an_answer_still_gives_valid_json(tmp_path: Path) -> None:
    nothing = make_run(make_record(0, due=1.0, ttft=None, error="timeout"), queue=())
    write_report(make_result(nothing, nothing, nothing), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["full"]["ttft_seconds"]["p95"] is None
    assert report["full"]["errors"] == 1
    assert report["controlled"]["calm_tokens_ratio"] == {"prefill": None, "decode": None}
    assert "nan" not in report["calm_steps"]["sentence"]


def test_nan_becomes_null_at_any_depth() -> None:
    nan = float("nan")
    assert without_nan({"a": [1.0, nan], "b": {"c": nan}}) == {"a": [1.0, None], "b": {"c": None}}


def test_the_verdict_says_that_attainment_rose_and_what_it_cost() -> None:
    text = verdict(*_runs(), 0.15)
    assert (
        "raised the share of requests within both SLOs to 100.0%, from 66.7% at full quality "
        "before it and 66.7% after it (in the burst: to 100.0%, from 0.0% and 0.0%)" in text
    )
    assert "0.1000" in text
    assert "within the 0.1500 that it was allowed" in text
    assert "No request failed." in text


def test_the_verdict_says_when_the_controller_did_not_help() -> None:
    assert "did not change" in verdict(*_runs(slo_attainment_ratio=2 / 3), 0.15)
    assert "lowered the share" in verdict(*_runs(slo_attainment_ratio=0.2), 0.15)


@pytest.mark.parametrize("order", [(0.3, 0.9), (0.9, 0.3)])
def test_the_verdict_claims_nothing_that_lies_between_the_runs_around_it(
    order: tuple[float, float],
) -> None:
    before, after, controlled = _runs(slo_attainment_ratio=0.8)
    before, after = (
        run | {"slo_attainment_ratio": ratio}
        for run, ratio in zip((before, after), order, strict=True)
    )
    text = verdict(before, after, controlled, 0.15)
    assert "cannot be told" in text
    assert not re.search("raised|lowered|did not change", text)


@pytest.mark.parametrize(
    ("ttfts", "told"),
    [((4.0, 5.0), None), ((0.8, 4.0), "in one of"), ((0.8, 0.9), "in both of")],
)
def test_the_verdict_says_when_full_quality_carried_the_burst(
    ttfts: tuple[float, float], told: str | None
) -> None:
    before, after = (make_full_run(ttft) for ttft in ttfts)
    report = build_report(make_result(before, make_controlled_run(), after))
    text = verdict(report["full_before"], report["full_after"], report["controlled"], 0.15)
    assert ("less of an overload" in text) is (told is not None)
    assert told is None or f"Full quality kept 60% of the burst or more {told} its runs" in text


@pytest.mark.parametrize("later_first", [False, True])
def test_the_better_run_at_full_quality_is_the_one_that_is_compared(later_first: bool) -> None:
    fulls = [make_full_run(4.0), make_full_run(0.8)]
    before, after = reversed(fulls) if later_first else fulls
    report = build_report(make_result(before, make_controlled_run(), after))
    assert report["full"] == report["full_before" if later_first else "full_after"]
    assert report["full"]["slo_attainment_ratio"] == 1.0


@pytest.mark.parametrize(("last", "steady"), [(3.0, False), (3.7, True), (4.3, True), (5.0, False)])
def test_drift_is_the_change_of_what_full_quality_served_in_the_burst(
    last: float, steady: bool
) -> None:
    before, after, _ = _runs()
    key = "burst_served_requests_per_second"
    told = drift(before | {key: 4.0}, after | {key: last})
    assert told["change_ratio"] == pytest.approx(last / 4.0 - 1)
    assert told["within_bound"] is (abs(last / 4.0 - 1) <= DRIFT_BOUND_RATIO) is steady
    assert ("kept its speed" in told["sentence"]) is steady


def test_the_page_has_a_column_for_each_run(tmp_path: Path) -> None:
    write_report(make_usual_result(), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("full quality, before", "full quality, after", "controlled"):
        assert f"<th>{name}</th>" in page
    row = re.search(r"<tr><td>burst</td>(.*?)</tr>", page)
    assert row is not None
    assert row[1] == "<td>0.0%</td><td>0.0%</td><td>100.0%</td>"


def test_the_verdict_says_when_the_budget_never_moved() -> None:
    assert "never moved the budget" in verdict(*_runs(budget_changes=0), 0.15)


def test_the_verdict_distrusts_runs_with_errors() -> None:
    assert "1 requests failed, so these figures are not to be trusted" in verdict(
        *_runs(errors=1), 0.15
    )


def test_a_loss_within_its_error_is_not_called_a_rise() -> None:
    text = verdict(*_runs(heldout_nll=1.201, heldout_nll_increase_standard_error=0.002), 0.15)
    assert "within what the sample can resolve" in text


def test_the_verdict_says_when_more_was_lost_than_allowed() -> None:
    assert "beyond the 0.0500 that it was allowed" in verdict(*_runs(), 0.05)
