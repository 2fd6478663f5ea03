"""The loop on real parts: SGLang, controller, Prometheus; a killed controller; every panel."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from live_ordeals import Ordeals, in_control
from live_pair import Evidence, run_story

from sglang_alloc.shared_table_words import source_code
from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.sglang_loads import missing_fields, parse_loads
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
    "sglang:num_queue_reqs": {"model_name", "tp_rank"},
    "sglang:num_running_reqs": {"model_name", "tp_rank"},
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
    assert ordeals.tick_errors.endswith(" 0.0")


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
    assert parse_loads(evidence.server_loads).rank_times[0].steps > 0


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
