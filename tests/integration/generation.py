"""Requests to a real server whose answers two runs can be compared by."""

from __future__ import annotations

from typing import Any, NamedTuple

import httpx2

GREEDY = {"temperature": 0.0, "ignore_eos": True}

# Few and short: the tests compare runs of the same requests, one after the other.
PROMPTS = [
    [(7 * i + offset) % 256 for i in range(length)]
    for offset, length in ((1, 3), (5, 33), (9, 120))
]


class Generated(NamedTuple):
    """Greedy tokens and their logprobs, and the logprobs of the prompt, exactly as served."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float | None, ...]


def generate(
    url: str,
    prompt: list[int],
    new_tokens: int = 16,
    *,
    custom_params: dict[str, Any] | None = None,
    priority: int | None = None,
) -> Generated:
    """Return one request's greedy continuation with all logprobs."""
    body: dict[str, Any] = {
        "input_ids": prompt,
        "sampling_params": {
            **GREEDY,
            "max_new_tokens": new_tokens,
            "custom_params": custom_params,
        },
        "priority": priority,
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    response = httpx2.post(f"{url}/generate", json=body, timeout=120.0, trust_env=False)
    response.raise_for_status()
    meta = response.json()["meta_info"]
    return Generated(
        tokens=tuple(token for _, token, *_ in meta["output_token_logprobs"]),
        logprobs=tuple(logprob for logprob, *_ in meta["output_token_logprobs"]),
        prompt_logprobs=tuple(logprob for logprob, *_ in meta["input_token_logprobs"]),
    )


def generate_all(url: str, prompts: list[list[int]], new_tokens: int = 16) -> list[Generated]:
    """Return the continuations of prompts sent one after the other, so batches are the same."""
    return [generate(url, prompt, new_tokens) for prompt in prompts]
