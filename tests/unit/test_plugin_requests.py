"""How a scheduler's requests come to their own budgets, with small objects in SGLang's place."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_alloc.plugin_requests import RequestBudgets
from sglang_alloc.priority_floors import PriorityFloor
from sglang_alloc.request_budget import PARAMETER, OwnBudget, OwnBudgets, RequestRules

FLOORS = (PriorityFloor(0, 3), PriorityFloor(2, 8), PriorityFloor(5, None))
RULES = RequestRules("any", 3, 12, FLOORS)
FULL = OwnBudget(12, 12)


class _Request:
    def __init__(self, wish: object = None, priority: int | None = None) -> None:
        params = None if wish is None else {PARAMETER: wish}
        self.sampling_params = SimpleNamespace(custom_params=params)
        self.priority = priority


class _Mode:
    def __init__(self, name: str) -> None:
        self._name = name

    def is_extend(self) -> bool:
        return self._name in ("extend", "verify")

    def is_target_verify(self) -> bool:
        return self._name == "verify"


@pytest.fixture
def ignored() -> list[int]:
    return []


@pytest.fixture
def budgets(ignored: list[int]) -> RequestBudgets:
    return RequestBudgets(RULES, on_ignored=lambda: ignored.append(1))


def _batch(
    mode: str, num_tokens: int, lengths: list[int] | None = None, layout: object = None
) -> Any:
    return SimpleNamespace(
        forward_mode=_Mode(mode),
        input_ids=[0] * num_tokens,
        extend_seq_lens_cpu=lengths,
        spec_info=SimpleNamespace(ragged_verify_layout=layout),
    )


def _of_forward(budgets: RequestBudgets, batch: Any, requests: list[_Request]) -> OwnBudgets | None:
    for request in requests:
        budgets.admit(request)
    budgets.attach(batch, requests)
    return budgets.of_forward(batch)


def test_a_prefill_has_the_tokens_of_each_request(budgets: RequestBudgets) -> None:
    requests = [_Request(), _Request("full"), _Request(4)]
    found = _of_forward(budgets, _batch("extend", 9, [2, 3, 4]), requests)
    assert found == OwnBudgets([None, FULL, OwnBudget(3, 4)], [2, 3, 4])


@pytest.mark.parametrize(("mode", "each"), [("decode", 1), ("verify", 4)])
def test_a_decode_step_has_as_many_tokens_for_each(
    budgets: RequestBudgets, mode: str, each: int
) -> None:
    requests = [_Request(4), _Request()]
    found = _of_forward(budgets, _batch(mode, 2 * each), requests)
    assert found == OwnBudgets([OwnBudget(3, 4), None], [each, each])


@pytest.mark.parametrize(("num_tokens", "layout"), [(8, object()), (7, None)])
def test_drafts_of_unequal_lengths_are_nobodys_own(
    budgets: RequestBudgets,
    ignored: list[int],
    caplog: pytest.LogCaptureFixture,
    num_tokens: int,
    layout: object,
) -> None:
    """Divided alike, the tokens of one request would get the budget of the other."""
    requests = [_Request("full"), _Request(4)]
    batch = _batch("verify", num_tokens, layout=layout)
    assert _of_forward(budgets, batch, requests) is None
    assert budgets.of_forward(batch) is None
    assert len(ignored) == 2
    assert caplog.text.count("drafts of unequal lengths") == 1


def test_rows_behind_a_decode_steps_requests_are_nobodys(budgets: RequestBudgets) -> None:
    found = _of_forward(budgets, _batch("decode", 4), [_Request(4), _Request()])
    assert found == OwnBudgets([OwnBudget(3, 4), None], [1, 1])


def test_urgent_requests_are_protected_unasked_and_whatever_they_ask(
    budgets: RequestBudgets,
) -> None:
    requests = [_Request(priority=5), _Request(4, priority=7), _Request(priority=-1)]
    found = _of_forward(budgets, _batch("decode", 3), requests)
    assert found is not None
    assert found.of_requests == [FULL, FULL, None]


def test_requests_of_a_class_have_its_floor_unasked_and_whatever_they_ask(
    budgets: RequestBudgets,
) -> None:
    wishes = (None, 4, 10, "full", "half")
    requests = [_Request(wish, priority=2) for wish in wishes]
    found = _of_forward(budgets, _batch("extend", 10, [2] * 5), requests)
    floor = OwnBudget(8, 12)
    expected = [floor, OwnBudget(8, 8), OwnBudget(8, 10), FULL, floor]
    assert found == OwnBudgets(expected, [2] * 5)


def test_a_floor_that_every_budget_is_above_costs_nothing(budgets: RequestBudgets) -> None:
    """Else a floor for the least urgent would have every forward of the server looked through."""
    requests = [_Request(priority=0), _Request(12), _Request(12, priority=1)]
    assert _of_forward(budgets, _batch("decode", 3), requests) is None
    assert len(budgets._of) == 0


def test_ranks_that_are_told_alike_give_a_batch_the_same_floors() -> None:
    """Each has its own requests, made of the same broadcast, and its own counters."""
    ranks = [RequestBudgets(RULES, on_ignored=lambda: None) for _ in range(2)]
    found = [
        _of_forward(
            rank,
            _batch("extend", 12, [3] * 4),
            [_Request(priority=priority) for priority in (None, 1, 2, 6)],
        )
        for rank in ranks
    ]
    assert found[0] == found[1] == OwnBudgets([None, None, OwnBudget(8, 12), FULL], [3] * 4)


def test_a_wish_that_cannot_be_granted_is_counted_and_left_out(
    budgets: RequestBudgets, ignored: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    requests = [_Request("half"), _Request(99)]
    assert _of_forward(budgets, _batch("decode", 2), requests) is None
    assert len(ignored) == 2
    assert "without its own budget" in caplog.text


def test_a_batch_without_wishes_carries_nothing(budgets: RequestBudgets) -> None:
    batch = _batch("decode", 1)
    kept = _Request(4)
    assert _of_forward(budgets, batch, [_Request()]) is None
    budgets.admit(kept)
    budgets.attach(batch, [_Request()])
    assert vars(batch).keys() == vars(_batch("decode", 1)).keys()


def test_a_finished_request_is_forgotten(budgets: RequestBudgets) -> None:
    request = _Request("full")
    budgets.admit(request)
    assert len(budgets._of) == 1
    del request
    gc.collect()
    assert len(budgets._of) == 0
