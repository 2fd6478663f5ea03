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
    body = _body(prompt, new_tokens) | {"priority": priority}
    body["sampling_params"]["custom_params"] = custom_params
    return _generated(_post(url, body))


def generate_together(url: str, prompts: list[list[int]], new_tokens: int) -> list[Generated]:
    """Return the continuations of prompts that come as one request and are decoded together."""
    return [_generated(answer) for answer in _post(url, _body(prompts, new_tokens))]


def _body(input_ids: list[int] | list[list[int]], new_tokens: int) -> dict[str, Any]:
    return {
        "input_ids": input_ids,
        "sampling_params": {**GREEDY, "max_new_tokens": new_tokens},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def _post(url: str, body: dict[str, Any]) -> Any:
    response = httpx2.post(f"{url}/generate", json=body, timeout=120.0, trust_env=False)
    return response.raise_for_status().json()


def _generated(answer: dict[str, Any]) -> Generated:
    meta = answer["meta_info"]
    return Generated(
        tokens=tuple(token for _, token, *_ in meta["output_token_logprobs"]),
        logprobs=tuple(logprob for logprob, *_ in meta["output_token_logprobs"]),
        prompt_logprobs=tuple(logprob for logprob, *_ in meta["input_token_logprobs"]),
    )


def generate_all(url: str, prompts: list[list[int]], new_tokens: int = 16) -> list[Generated]:
    """Return the continuations of prompts sent one after the other, so batches are the same."""
    return [generate(url, prompt, new_tokens) for prompt in prompts]
