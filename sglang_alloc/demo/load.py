"""Demo, step 3: send a trace over HTTP at its due times and record what each request felt."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import httpx2

from sglang_alloc.demo.trace import Trace, TracedRequest

REQUEST_TIMEOUT_SECONDS = 90.0
_TICK_SECONDS = 0.5


class RequestRecord(NamedTuple):
    """What one request felt, in seconds after the start of the run.

    `ttft_seconds` counts from the *due* time, so a late client cannot hide a slow server (no
    coordinated omission). `inter_token_seconds` has one gap per token after the first; a chunk of
    n tokens counts as n equal gaps, as in SGLang's own histogram. `error` is None when all asked
    tokens came.
    """

    request_id: int
    phase: str
    due_second: float
    sent_second: float
    first_token_second: float | None
    finished_second: float
    inter_token_seconds: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    error: str | None

    @property
    def ttft_seconds(self) -> float | None:
        if self.first_token_second is None:
            return None
        return self.first_token_second - self.due_second

    @property
    def mean_itl_seconds(self) -> float | None:
        if not self.inter_token_seconds:
            return None
        return sum(self.inter_token_seconds) / len(self.inter_token_seconds)


class Arrival(NamedTuple):
    """One streamed chunk: when it came and how many output tokens exist since."""

    second: float
    output_tokens: int
    prompt_tokens: int


OnTick = Callable[[float, int, int], None]


async def offer_load(
    url: str,
    trace: Trace,
    *,
    timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    on_tick: OnTick | None = None,
) -> list[RequestRecord]:
    """Send every request at its due time (open loop) and return the records in trace order.

    A request that fails or takes longer than `timeout_seconds` becomes a record with an error;
    the others go on. `on_tick(second, sent, finished)` is called twice a second; what it raises
    ends the run.
    """
    started = time.monotonic()
    tasks: list[asyncio.Task[RequestRecord]] = []
    async with streaming_client(url) as client:
        work = asyncio.create_task(_send_all(client, trace, tasks, started, timeout_seconds))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=_TICK_SECONDS)
                if on_tick is not None:
                    finished = sum(task.done() for task in tasks)
                    on_tick(time.monotonic() - started, len(tasks), finished)
            return work.result()
        finally:
            for task in (work, *tasks):
                task.cancel()


def streaming_client(url: str) -> httpx2.AsyncClient:
    """Return a client without limits: a pool that queues would hide latency.

    Time is limited per whole request by `send_request`, not per read.
    """
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx2.AsyncClient(base_url=url, limits=limits, timeout=None, trust_env=False)


async def _send_all(
    client: httpx2.AsyncClient,
    trace: Trace,
    tasks: list[asyncio.Task[RequestRecord]],
    started: float,
    timeout_seconds: float,
) -> list[RequestRecord]:
    for request in trace.requests:
        await asyncio.sleep(max(0.0, started + request.due_second - time.monotonic()))
        coroutine = send_request(client, request, started, timeout_seconds)
        tasks.append(asyncio.create_task(coroutine))
    return await asyncio.gather(*tasks)


async def send_request(
    client: httpx2.AsyncClient,
    request: TracedRequest,
    started: float,
    timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
) -> RequestRecord:
    """Stream one request from SGLang's /generate; never raises for what a server can cause."""
    sent_second = time.monotonic() - started
    arrivals: list[Arrival] = []
    error: str | None = None
    try:
        stream = _stream(client, request, started, arrivals)
        await asyncio.wait_for(stream, timeout_seconds)
    except asyncio.TimeoutError:
        error = f"not finished after {timeout_seconds:g} s"
    except (httpx2.HTTPError, httpx2.StreamError, _ServerError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return _record(request, sent_second, time.monotonic() - started, arrivals, error)


class _ServerError(Exception):
    """The server answered, but not with the tokens that were asked for."""


async def _stream(
    client: httpx2.AsyncClient,
    request: TracedRequest,
    started: float,
    arrivals: list[Arrival],
) -> None:
    async with client.stream("POST", "/generate", json=generate_body(request)) as response:
        if response.status_code != 200:
            detail = (await response.aread()).decode("utf-8", errors="replace")
            raise _ServerError(f"HTTP {response.status_code}: {detail[:200]}")
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            payload = line[5:].strip()
            if payload == "[DONE]":
                return
            arrivals.append(_arrival(payload, time.monotonic() - started))


def generate_body(request: TracedRequest) -> dict[str, Any]:
    """Return the /generate body: greedy, and exactly `output_tokens` tokens."""
    sampling = {
        "max_new_tokens": request.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    return {"text": request.prompt, "sampling_params": sampling, "stream": True}


def _arrival(payload: str, second: float) -> Arrival:
    try:
        message = json.loads(payload)
        if "error" in message:
            raise _ServerError(str(message["error"])[:200])
        meta = message["meta_info"]
        reason = meta.get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise _ServerError(f"aborted: {reason.get('message', '')}"[:200])
        return Arrival(second, int(meta["completion_tokens"]), int(meta["prompt_tokens"]))
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        raise _ServerError(f"unexpected chunk {payload[:120]!r}") from failure


def _record(
    request: TracedRequest,
    sent_second: float,
    finished_second: float,
    arrivals: Sequence[Arrival],
    error: str | None,
) -> RequestRecord:
    got = arrivals[-1].output_tokens if arrivals else 0
    if error is None and got != request.output_tokens:
        error = f"{got} output tokens came, {request.output_tokens} were asked for"
    return RequestRecord(
        request_id=request.request_id,
        phase=request.phase,
        due_second=request.due_second,
        sent_second=sent_second,
        first_token_second=arrivals[0].second if arrivals else None,
        finished_second=finished_second,
        inter_token_seconds=inter_token_gaps(arrivals),
        prompt_tokens=arrivals[-1].prompt_tokens if arrivals else 0,
        output_tokens=got,
        error=error,
    )


def inter_token_gaps(arrivals: Sequence[Arrival]) -> tuple[float, ...]:
    """Return one gap per token after the first chunk; n tokens in a chunk share its gap."""
    gaps: list[float] = []
    for before, after in itertools.pairwise(arrivals):
        tokens = after.output_tokens - before.output_tokens
        if tokens > 0:
            gaps.extend([(after.second - before.second) / tokens] * tokens)
    return tuple(gaps)
