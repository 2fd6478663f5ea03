"""The tables of docs/backends.md say what the code does, for every backend that SGLang knows."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import server_facts

from sglang_alloc.errors import UnsupportedServerError
from sglang_alloc.moe_backends import DISPATCHERS, GRAPHS, RUNNERS, Verdict
from sglang_alloc.server_check import ExpertKernel, ServerFacts, check_server

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"
TABLES = {"runner": RUNNERS, "dispatcher": DISPATCHERS, "captured as": GRAPHS}
GOOD = replace(server_facts.GOOD, graph_backends={"prefill": "breakable", "decode": "full"})


def _documented(head: str) -> dict[str, tuple[str, str]]:
    """Return the rows of the page's table with this heading: name -> (verdict, reason)."""
    page = PAGE.read_text(encoding="utf-8")
    table = page[page.index(f"| {head} | verdict | reason |") :].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) == table.strip().count("\n") - 1
    return {name: (verdict, reason) for name, verdict, reason in rows}


@pytest.mark.parametrize("head", TABLES)
def test_the_page_says_what_the_code_does(head: str) -> None:
    expected = {
        name: ("works" if verdict.works else "refused", verdict.reason)
        for name, verdict in TABLES[head].items()
    }
    assert _documented(head) == expected


def _facts(head: str, name: str) -> ServerFacts:
    if head == "runner":
        return replace(GOOD, expert_kernels={ExpertKernel("SomeMethod", name, amx=False)})
    if head == "dispatcher":
        return replace(GOOD, a2a_backend=name)
    return replace(GOOD, graph_backends={"prefill": name})


@pytest.mark.parametrize(
    ("head", "name", "verdict"),
    [(head, name, verdict) for head, table in TABLES.items() for name, verdict in table.items()],
)
def test_a_server_starts_where_it_works_and_is_told_the_reason_elsewhere(
    head: str, name: str, verdict: Verdict
) -> None:
    if verdict.works:
        check_server(_facts(head, name))
        return
    with pytest.raises(UnsupportedServerError, match=re.escape(verdict.reason)):
        check_server(_facts(head, name))


def test_a_backend_that_nobody_has_heard_of_is_refused() -> None:
    for head in TABLES:
        with pytest.raises(UnsupportedServerError, match="not known to this release"):
            check_server(_facts(head, "brand_new"))


@pytest.fixture(scope="module")
def engine_utils() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers.moe import utils
    return utils


def test_every_backend_of_the_installed_sglang_is_in_the_tables(engine_utils: Any) -> None:
    assert {backend.value for backend in engine_utils.MoeRunnerBackend} <= set(RUNNERS)
    assert {backend.value for backend in engine_utils.MoeA2ABackend} <= set(DISPATCHERS)


def test_every_way_of_capturing_is_in_the_tables() -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    assert set(Backend.ALL) | {Backend.TC_PIECEWISE} <= set(GRAPHS)
