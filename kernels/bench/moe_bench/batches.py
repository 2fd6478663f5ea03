"""Bench, what a served case is made of: a batch of made-up prompts, answered together."""

from __future__ import annotations

import random
import time

import httpx2

from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.server_runs.server_process import Server


def generate(
    client: httpx2.Client, requests: int, prompt_tokens: int, tokens: int, generator: random.Random
) -> float:
    """Let the server answer a batch with exactly `tokens` tokens each; return the seconds."""
    prompts = [[generator.randrange(2, 500) for _ in range(prompt_tokens)] for _ in range(requests)]
    sampling = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    started = time.perf_counter()
    response = client.post("/generate", json={"input_ids": prompts, "sampling_params": sampling})
    seconds = time.perf_counter() - started
    if response.status_code != 200:
        raise ServerRunError(
            f"a batch of {requests} prompts of {prompt_tokens} tokens was answered with HTTP "
            f"{response.status_code}: {response.text[:200]}"
        )
    return seconds


def client_of(server: Server) -> httpx2.Client:
    """Return a client of a server, patient with long batches."""
    return httpx2.Client(base_url=server.url, timeout=600.0, trust_env=False)
