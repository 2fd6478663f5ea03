"""Every metric that a rule or a panel reads is exported by somebody, under exactly that name."""

from __future__ import annotations

import re

import pytest
from pair_exposition import controller_text, metric_names, sglang_text, underscored, worker_text
from panel_queries import panel_queries
from prometheus_files import DASHBOARD, rules
from promql_names import metric_patterns

EXPRESSIONS = {f"{rule.get('record') or rule['alert']}": rule["expr"] for rule in rules()} | {
    f"{query.panel} {query.ref_id}": query.expression for query in panel_queries(DASHBOARD)
}


def _exported() -> set[str]:
    sglang = metric_names(sglang_text())
    return sglang | metric_names(worker_text()) | metric_names(controller_text())


def test_recorded_server_is_an_sglang_with_latency_histograms() -> None:
    names = metric_names(sglang_text())
    assert "sglang:time_to_first_token_seconds_bucket" in names
    assert len(names) > 100


@pytest.mark.parametrize("name", sorted(EXPRESSIONS))
def test_expression_reads_only_metrics_that_exist(name: str) -> None:
    known = _exported() | {rule["record"] for rule in rules() if "record" in rule}
    for pattern in metric_patterns(EXPRESSIONS[name]):
        assert any(re.fullmatch(pattern, metric) for metric in known), f"nobody exports {pattern}"


def test_both_spellings_of_sglang_are_read() -> None:
    patterns = {p for rule in rules() for p in metric_patterns(rule["expr"]) if "[:_]" in p}
    colons, underscores = metric_names(sglang_text()), metric_names(underscored(sglang_text()))
    assert len(patterns) == 6
    for pattern in patterns:
        assert any(re.fullmatch(pattern, metric) for metric in colons)
        assert any(re.fullmatch(pattern, metric) for metric in underscores)


def test_only_the_normalising_rules_name_sglangs_own_metrics() -> None:
    own = re.compile(r"sglang(:|_(?!alloc)|\[:_\])")
    readers = {n for n, e in EXPRESSIONS.items() for p in metric_patterns(e) if own.match(p)}
    assert readers
    assert all(name.startswith("sglang_alloc:") for name in readers)
