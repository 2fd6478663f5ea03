"""The open-loop load generator against a stand-in server that misbehaves on request."""

import asyncio
import time
from collections.abc import Iterator

import pytest
from streaming_server import streaming_server

from sglang_alloc.demo.load import (
    Arrival,
    RequestRecord,
    inter_token_gaps,
    offer_load,
    send_request,
    streaming_client,
)
from sglang_alloc.demo.trace import LoadPhase, Trace, TracedRequest


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with streaming_server() as address:
        yield address


def _make_trace(*prompts: str, due_second: float = 0.0, output_tokens: int = 4) -> Trace:
    requests = [
        TracedRequest(number, "calm", due_second, prompt, output_tokens)
        for number, prompt in enumerate(prompts)
    ]
    return Trace((LoadPhase("calm", 1.0, 1.0),), tuple(requests))


def _offer(url: str, trace: Trace, timeout_seconds: float = 120.0) -> list[RequestRecord]:
    return asyncio.run(offer_load(url, trace, timeout_seconds=timeout_seconds))


def test_an_answered_request_has_all_its_tokens_and_no_error(url: str) -> None:
    (record,) = _offer(url, _make_trace("normal words"))
    assert record.error is None
    assert (record.output_tokens, record.prompt_tokens) == (4, 5)
    assert len(record.inter_token_seconds) == 3
    assert record.first_token_second is not None
    assert record.sent_second <= record.first_token_second <= record.finished_second


def test_a_chunk_of_two_tokens_counts_as_two_equal_gaps(url: str) -> None:
    (record,) = _offer(url, _make_trace("pairs of tokens", output_tokens=5))
    gaps = record.inter_token_seconds
    assert len(gaps) == 4
    assert gaps[0] == gaps[1]
    assert gaps[2] == gaps[3]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("refuse this", "HTTP 503"),
        ("short answer", "3 output tokens came, 4 were asked for"),
        ("abort this", "aborted: gone"),
        ("garbage please", "unexpected chunk"),
    ],
)
def test_a_failed_request_is_a_record_and_the_others_go_on(
    url: str, prompt: str, message: str
) -> None:
    failed, answered = _offer(url, _make_trace(prompt, "normal words"))
    assert failed.error is not None
    assert message in failed.error
    assert answered.error is None


def test_a_silent_server_ends_in_a_timeout(url: str) -> None:
    (record,) = _offer(url, _make_trace("hang on"), timeout_seconds=0.2)
    assert record.error == "not finished after 0.2 s"
    assert record.ttft_seconds is None


def test_a_refused_connection_is_a_record() -> None:
    with streaming_server() as address:
        pass  # gone now
    (record,) = _offer(address, _make_trace("normal words"))
    assert record.error is not None
    assert "ConnectError" in record.error


def test_ttft_counts_from_the_due_time_of_a_request_that_was_sent_late(url: str) -> None:
    request = TracedRequest(0, "calm", 2.0, "normal words", 4)

    async def send() -> RequestRecord:
        async with streaming_client(url) as client:
            return await send_request(client, request, started=time.monotonic() - 5.0)

    record = asyncio.run(send())
    assert record.sent_second >= 5.0
    assert record.ttft_seconds is not None
    assert record.ttft_seconds >= 3.0


def test_requests_are_sent_at_their_due_time_though_earlier_ones_hang() -> None:
    with streaming_server() as address:  # the last request is what lets the first one go
        first, *others = _offer(address, _make_trace("hang on", "normal words", "release it"))
    assert first.error == "0 output tokens came, 4 were asked for"
    assert [record.error for record in others] == [None, None]


def test_what_the_tick_raises_ends_the_run(url: str) -> None:
    def server_died(second: float, sent: int, finished: int) -> None:
        raise RuntimeError("the server died")

    with pytest.raises(RuntimeError, match="the server died"):
        asyncio.run(offer_load(url, _make_trace("normal words"), on_tick=server_died))


def test_gaps_are_shared_by_the_tokens_of_a_chunk() -> None:
    arrivals = [Arrival(1.0, 1, 5), Arrival(1.3, 2, 5), Arrival(1.5, 4, 5), Arrival(1.6, 4, 5)]
    assert inter_token_gaps(arrivals) == pytest.approx((0.3, 0.1, 0.1))


def test_a_client_has_no_connection_limit_that_could_queue(url: str) -> None:
    records = _offer(url, _make_trace(*["normal words"] * 150))
    assert [record.error for record in records] == [None] * 150
