"""The demo's request trace: the same everywhere, calm, burst, calm."""

import pytest

from sglang_alloc.demo.trace import LoadPhase, Trace, make_trace
from sglang_alloc.server_runs.errors import ServerRunError

TEXTS = ["abcdefghij" * 60, "KLMNOPQRST" * 60]
PHASES = (
    LoadPhase("calm", 10.0, 2.0),
    LoadPhase("burst", 5.0, 20.0),
    LoadPhase("calm again", 10.0, 2.0),
)


def _make_trace(seed: int = 3, texts: list[str] = TEXTS) -> Trace:
    return make_trace(texts, PHASES, prompt_bytes=40, output_tokens=6, seed=seed)


def test_the_same_seed_gives_the_same_trace() -> None:
    assert _make_trace() == _make_trace()


def test_another_seed_gives_another_trace() -> None:
    assert _make_trace(seed=3).requests != _make_trace(seed=4).requests


def test_requests_are_due_in_order_and_within_their_phase() -> None:
    trace = _make_trace()
    bounds = {name: (start, end) for name, start, end in trace.phase_bounds()}
    due = [request.due_second for request in trace.requests]
    assert due == sorted(due)
    for request in trace.requests:
        start, end = bounds[request.phase]
        assert start <= request.due_second <= end


def test_each_phase_has_the_requests_of_its_rate() -> None:
    phases = [request.phase for request in _make_trace().requests]
    assert phases.count("calm") == phases.count("calm again") == 20
    assert phases.count("burst") == 100


def test_phase_bounds_follow_each_other() -> None:
    assert _make_trace().phase_bounds() == [
        ("calm", 0.0, 10.0),
        ("burst", 10.0, 15.0),
        ("calm again", 15.0, 25.0),
    ]


def test_prompts_are_pieces_of_the_texts_in_turn() -> None:
    requests = _make_trace().requests
    assert all(len(request.prompt) == 40 for request in requests)
    for request in requests:
        assert request.prompt in TEXTS[request.request_id % 2]


def test_a_prompt_never_splits_a_character() -> None:
    requests = _make_trace(texts=["aé€🙂" * 100]).requests
    sizes = [len(request.prompt.encode("utf-8")) for request in requests]
    assert all(37 <= size <= 40 for size in sizes)


def test_a_text_shorter_than_a_prompt_is_refused_with_both_sizes() -> None:
    with pytest.raises(ServerRunError, match=r"40 bytes.*only 5 characters"):
        _make_trace(texts=["short"])
