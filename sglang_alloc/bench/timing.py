"""Bench: how long the server takes to prefill and to decode a batch, timed from outside."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import httpx2

from sglang_alloc.demo.trace import cut_prompt
from sglang_alloc.server_runs.errors import ServerRunError

CONCURRENCIES = (1, 8, 32)
PREFILL_PROMPT_BYTES = 256
DECODE_PROMPT_BYTES = 32
DECODE_STEPS = 32


class Timing(NamedTuple):
    """One measurement; `seconds` is per batch of prompts (prefill) or per decode step."""

    phase: str  # "prefill" or "decode"
    concurrency: int
    seconds: float


def measure_timings(
    client: httpx2.Client,
    texts: Sequence[str],
    generator: random.Random,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time prefill and decode at each concurrency, in one batch of as many requests.

    Prefill is the time until `concurrency` prompts of PREFILL_PROMPT_BYTES have their first token.
    Decode is the difference between long and short answers to short prompts, per step: HTTP,
    tokenisation and prefill are in both and cancel. Prompts are text, so routing is what it is in
    use, and are cut anew for each batch.
    """

    def batch_seconds(concurrency: int, prompt_bytes: int, tokens: int) -> float:
        prompts = [
            cut_prompt(generator.choice(texts), prompt_bytes, generator) for _ in range(concurrency)
        ]
        started = clock()
        generate(client, prompts, tokens)
        return clock() - started

    batch_seconds(1, DECODE_PROMPT_BYTES, 4)  # the first batch after a pause is not measured
    timings = []
    for concurrency in CONCURRENCIES:
        prefill = batch_seconds(concurrency, PREFILL_PROMPT_BYTES, 1)
        short = batch_seconds(concurrency, DECODE_PROMPT_BYTES, 1)
        long = batch_seconds(concurrency, DECODE_PROMPT_BYTES, 1 + DECODE_STEPS)
        timings.append(Timing("prefill", concurrency, prefill))
        timings.append(Timing("decode", concurrency, (long - short) / DECODE_STEPS))
    return timings


def generate(client: httpx2.Client, prompts: Sequence[str], tokens: int) -> None:
    """Let the server answer all prompts as one batch with exactly `tokens` tokens each."""
    sampling = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    body = {"text": list(prompts), "sampling_params": sampling}
    response = client.post("/generate", json=body)
    if response.status_code != 200:
        raise ServerRunError(
            f"a batch of {len(prompts)} prompts was answered with HTTP {response.status_code}: "
            f"{response.text[:200]}"
        )
    answers: list[dict[str, Any]] = response.json()
    produced = {int(answer["meta_info"]["completion_tokens"]) for answer in answers}
    if produced != {tokens}:
        raise ServerRunError(f"{tokens} output tokens were asked for and {sorted(produced)} came")
