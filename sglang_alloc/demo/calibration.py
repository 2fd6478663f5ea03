"""Demo, step 2: measure this machine's capacity, then derive the arrival rates and the SLOs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import httpx2

from sglang_alloc.demo.load import RequestRecord, send_request, streaming_client
from sglang_alloc.demo.observation import METRICS_EVERY_SECONDS
from sglang_alloc.demo.trace import TracedRequest, cut_prompt
from sglang_alloc.server_runs.errors import ServerRunError


class RequestShape(NamedTuple):
    """The size of every request of the demo."""

    prompt_bytes: int
    output_tokens: int


class ClosedLoop(NamedTuple):
    """What `clients` back-to-back clients got from the server during `seconds`."""

    clients: int
    seconds: float
    requests_per_second: float
    median_ttft_seconds: float
    mean_itl_seconds: float


def faster(loops: Sequence[ClosedLoop]) -> ClosedLoop:
    """Return the measurement with the most requests per second."""
    return max(loops, key=lambda loop: loop.requests_per_second)


def measure_closed_loop(
    url: str,
    texts: Sequence[str],
    shape: RequestShape,
    *,
    clients: int,
    seconds: float,
    seed: int,
    on_tick: Callable[[], None] | None = None,
) -> ClosedLoop:
    """Keep `clients` requests in the server for `seconds`; return its throughput and latencies.

    Its /metrics are read meanwhile as by a controller: that takes time from the same cores.
    """
    requests = _endless_requests(texts, shape, random.Random(seed))
    return asyncio.run(_closed_loop(url, requests, clients, seconds, on_tick))


async def _closed_loop(
    url: str,
    requests: Iterator[TracedRequest],
    clients: int,
    seconds: float,
    on_tick: Callable[[], None] | None,
) -> ClosedLoop:
    started = time.monotonic()
    records: list[RequestRecord] = []

    async def one_client() -> None:
        while (second := time.monotonic() - started) < seconds:
            request = next(requests)._replace(due_second=second)
            records.append(await send_request(http, request, started))

    async with streaming_client(url) as http:
        reader = asyncio.create_task(_read_metrics(http))
        group = asyncio.gather(*(one_client() for _ in range(clients)))
        while not group.done():
            await asyncio.sleep(0.25)
            if on_tick is not None:
                on_tick()
        reader.cancel()
        await group
    return _summary(records, clients, time.monotonic() - started)


async def _read_metrics(http: httpx2.AsyncClient) -> None:
    while True:
        with contextlib.suppress(httpx2.HTTPError):
            await http.get("/metrics")
        await asyncio.sleep(METRICS_EVERY_SECONDS)


def _summary(records: Sequence[RequestRecord], clients: int, seconds: float) -> ClosedLoop:
    failed = next((record for record in records if record.error is not None), None)
    if failed is not None:
        raise ServerRunError(
            f"calibration asked the server for {clients} requests at a time and one failed: "
            f"{failed.error}. The server's log tells more"
        )
    ttfts = [record.ttft_seconds for record in records if record.ttft_seconds is not None]
    gaps = [gap for record in records for gap in record.inter_token_seconds]
    return ClosedLoop(
        clients=clients,
        seconds=seconds,
        requests_per_second=len(records) / seconds,
        median_ttft_seconds=statistics.median(ttfts),
        mean_itl_seconds=statistics.fmean(gaps),
    )


def _endless_requests(
    texts: Sequence[str], shape: RequestShape, generator: random.Random
) -> Iterator[TracedRequest]:
    for index in itertools.count():
        prompt = cut_prompt(texts[index % len(texts)], shape.prompt_bytes, generator)
        yield TracedRequest(index, "calibration", 0.0, prompt, shape.output_tokens)
