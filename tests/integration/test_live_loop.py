"""The loop on real parts: SGLang, controller, Prometheus; a killed controller; every panel."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from live_ordeals import Ordeals, in_control
from live_pair import Evidence, run_story
from live_restart import Restart

from sglang_alloc.shared_table import SharedTable
from sglang_alloc.shared_table_words import source_code
from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.samples import SLOS
from sglang_alloc_controller.series_fold import SHARING_RANKS, TOKENS
from sglang_alloc_controller.sglang_loads import DecodeMoments, missing_fields, parse_loads
from sglang_alloc_controller.sglang_metrics import missing_series

pytestmark = pytest.mark.server

WORKER_METRICS = (
    'sglang_alloc_budget_activations{phase="decode"',
    'sglang_alloc_budget_activations{phase="prefill"',
    'sglang_alloc_quota_activations{layer="0",phase="decode"',
    'sglang_alloc_activations_per_token{phase="decode"',
    'sglang_alloc_kept_mass_ratio{phase="decode"',
    "sglang_alloc_distinct_experts_per_step{",
    "sglang_alloc_acknowledged_generation{",
    'sglang_alloc_selection_source{source="controller"',
    "sglang_alloc_fallbacks_total{",
    'sglang_alloc_calm_budget_activations{phase="decode"',
    'sglang_alloc_tokens_total{calm="yes",phase="decode"',
    'sglang_alloc_tokens_total{calm="no",phase="prefill"',
)

# Without is_streaming every request would count for TTFT; without le there is no bucket.
LABELS = {
    "sglang:time_to_first_token_seconds_bucket": {"le", "is_streaming", "model_name"},
    "sglang:inter_token_latency_seconds_bucket": {"le", "model_name"},
    "sglang:num_queue_reqs": {"model_name", *SHARING_RANKS},
    "sglang:num_running_reqs": {"model_name", *SHARING_RANKS},
    f"sglang:{TOKENS}": {"model_name", "mode", *SHARING_RANKS},
}


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.fail("prometheus is missing: run `make tools`", pytrace=False)
    return run_story(_folder(tmp_path_factory), binary)


def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


def test_a_broken_slo_lowers_the_budget(evidence: Evidence) -> None:
    assert evidence.before is not None
    assert evidence.lowered is not None
    assert evidence.lowered.decode_budget < evidence.before.decode_budget
    assert evidence.lowered.generation > evidence.before.generation


def test_neither_a_killed_controller_nor_any_ordeal_loses_a_request(evidence: Evidence) -> None:
    assert len(evidence.records) > 100
    assert [record.error for record in evidence.records if record.error] == []


def test_without_its_controller_the_worker_falls_back_to_full_quality(evidence: Evidence) -> None:
    assert evidence.fallback_sources == {source_code("fallback")}


def test_a_restarted_controller_resumes_without_a_jump(evidence: Evidence) -> None:
    assert evidence.lowered is not None
    assert evidence.resumed is not None
    largest_step = LawSettings().degrade_step_max
    for before, after in zip(evidence.lowered[1:], evidence.resumed[1:], strict=True):
        assert abs(after - before) <= largest_step * 40 + 1


def test_a_stopped_controller_returns_to_full_quality(evidence: Evidence) -> None:
    assert evidence.released is not None
    assert evidence.before is not None
    assert evidence.released[1:] == evidence.before[1:]


@pytest.fixture(scope="module")
def ordeals(evidence: Evidence) -> Ordeals:
    assert evidence.ordeals is not None
    return evidence.ordeals


def test_a_scheduler_that_hangs_behind_sglangs_http_server_makes_the_input_stale(
    ordeals: Ordeals,
) -> None:
    assert (ordeals.hung_state, ordeals.state_after_hang) == ("stale", "valid")


def test_a_request_that_a_hang_catches_gets_all_its_tokens(ordeals: Ordeals) -> None:
    assert ordeals.long_request is not None
    assert ordeals.long_request.error is None


def test_a_second_controller_of_a_serving_pair_is_refused(ordeals: Ordeals) -> None:
    assert ordeals.second_controller is not None
    assert ordeals.second_controller.returncode == 2
    assert "already does" in ordeals.second_controller.stderr


def test_a_configuration_with_a_mistake_is_refused_while_serving(ordeals: Ordeals) -> None:
    assert "mode is 'automatic'" in ordeals.refused_reload


def test_a_deleted_shared_file_stays_in_use_by_worker_and_controller(ordeals: Ordeals) -> None:
    assert ordeals.sources_after_deletion == in_control()
    assert ordeals.tick_errors == 0.0


@pytest.fixture(scope="module")
def restart(evidence: Evidence) -> Restart:
    assert evidence.restart is not None
    return evidence.restart


def test_a_server_that_ends_makes_the_input_stale_until_it_is_there_again(restart: Restart) -> None:
    assert (restart.state_without_server, restart.state_after) == ("stale", "valid")
    assert restart.starts_seen == 1.0
    assert restart.errors == []


def test_the_worker_of_a_restarted_server_obeys_the_controller_that_ran_on(
    restart: Restart,
) -> None:
    assert restart.worker.pid != restart.pid_before
    assert {restart.worker.acknowledged_source} == in_control()


def test_no_budget_of_the_whole_story_is_out_of_bounds(evidence: Evidence) -> None:
    with SharedTable.open(evidence.table, writable=False) as table:
        lowest, highest = table.shape.budget_min, table.shape.budget_max
    assert len(evidence.logged_budgets) > 2
    assert lowest <= min(evidence.logged_budgets) < max(evidence.logged_budgets) <= highest


@pytest.mark.parametrize("metric", WORKER_METRICS)
def test_the_worker_is_seen_in_sglangs_own_metrics(evidence: Evidence, metric: str) -> None:
    lines = [line for line in evidence.server_metrics.splitlines() if line.startswith(metric)]
    assert lines, f"{metric} is not in /metrics"


def test_sglang_still_exports_every_series_that_the_controller_reads(evidence: Evidence) -> None:
    assert missing_series(evidence.server_metrics) == []


def test_sglang_still_has_every_field_of_its_loads_that_the_controller_reads(
    evidence: Evidence,
) -> None:
    assert missing_fields(evidence.server_loads) == []
    times = parse_loads(evidence.server_loads).rank_times[0]
    assert times.prefill_tokens > 0
    assert times.prefill_seconds > 0


def test_sglang_still_sums_its_decode_steps_in_the_order_that_the_controller_reads(
    evidence: Evidence,
) -> None:
    """Batches of one and of more requests, no speculation, and steps that take milliseconds."""
    moments = DecodeMoments(*json.loads(evidence.server_loads)["loads"][0]["decode_moments"])
    assert 0 < moments.steps < moments.requests == moments.tokens < moments.squared_requests
    assert 1e-4 < moments.microseconds / 1e6 / moments.steps < 10.0
    assert moments.microseconds < moments.request_microseconds


def test_by_prometheus_the_controller_reads_what_the_server_says_itself(evidence: Evidence) -> None:
    by_prometheus, direct = evidence.by_prometheus, evidence.direct
    assert by_prometheus is not None
    assert direct is not None
    assert by_prometheus.taken_at_seconds < direct.taken_at_seconds
    assert by_prometheus.edges == direct.edges
    for slo in SLOS:
        (earlier,) = by_prometheus.series(slo).values()
        (later,) = direct.series(slo).values()
        assert earlier.edges == later.edges
        assert all(0 <= a <= b for a, b in zip(earlier.counts, later.counts, strict=True))
        assert earlier.counts[-1] > 0
        assert 0 < earlier.sum_seconds <= later.sum_seconds
    assert by_prometheus.prefill_tokens is not None
    assert direct.prefill_tokens is not None
    assert 0 < by_prometheus.prefill_tokens <= direct.prefill_tokens
    assert (by_prometheus.engines, by_prometheus.model_names) == (1, direct.model_names)
    assert 0 <= by_prometheus.queue_requests <= len(evidence.records)


@pytest.mark.parametrize(("series", "labels"), LABELS.items())
def test_sglang_still_has_every_label_that_the_controller_tells_series_apart_by(
    evidence: Evidence, series: str, labels: set[str]
) -> None:
    lines = [one for one in evidence.server_metrics.splitlines() if one.startswith(f"{series}{{")]
    assert lines, f"{series} is not in /metrics"
    for line in lines:
        assert labels <= set(re.findall(r"(\w+)=", line)), line


def test_every_query_of_the_dashboard_returns_data_from_the_live_pair(evidence: Evidence) -> None:
    assert evidence.empty_queries == []
