"""Demo, step 4: what the budgets that were used cost, measured through the server itself.

A window of held-out text is a prompt and a continuation. The prompt is prefilled at a prefill
budget, which leaves its keys and values in the server's prefix cache; then the continuation is
scored on top of that cache at a decode budget. So the prefill budget costs here what it costs in
service: what its cached states do to the tokens that follow. The continuation is scored in one
forward, by the table's prefill rows at the decode budget, because the server's API cannot force
given tokens through decode steps.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import httpx2

from sglang_alloc.demo.trace import cut_prompt
from sglang_alloc.server_runs.budget_override import BudgetOverride, flush_cache
from sglang_alloc.server_runs.errors import ServerRunError

_WINDOWS_PER_CALL = 8


class Window(NamedTuple):
    """A piece of held-out text: the prompt, and the continuation that is scored."""

    prompt: str
    continuation: str


class Level(NamedTuple):
    """A pair of budgets and the share of the served tokens that it stands for."""

    prefill_budget: int
    decode_budget: int
    weight: float


class LevelLoss(NamedTuple):
    """Mean loss of the scored tokens of each window, in nats per token, at one pair of budgets."""

    level: Level
    window_losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.window_losses)


def cut_windows(
    texts: Sequence[str], count: int, prompt_bytes: int, continuation_bytes: int, seed: int
) -> list[Window]:
    """Cut `count` windows from the texts in turn; the same arguments give the same windows."""
    generator = random.Random(seed)
    windows = []
    for index in range(count):
        piece = cut_prompt(texts[index % len(texts)], prompt_bytes + continuation_bytes, generator)
        prompt = piece.encode("utf-8")[:prompt_bytes].decode("utf-8", errors="ignore")
        windows.append(Window(prompt, piece[len(prompt) :]))
    return windows


def measure_level(
    url: str,
    override: BudgetOverride,
    windows: Sequence[Window],
    level: Level,
    on_tick: Callable[[], None],
) -> LevelLoss:
    """Score every window at one pair of budgets, on an empty prefix cache."""
    with httpx2.Client(base_url=url, timeout=120.0, trust_env=False) as client:
        flush_cache(client)
        override.set(level.prefill_budget, level.prefill_budget)
        prompt_tokens: list[int] = []
        for part in _parts(windows):
            prompt_tokens += _prefill(client, [window.prompt for window in part])
            on_tick()
        override.set(level.decode_budget, level.decode_budget)
        losses: list[float] = []
        for start, part in enumerate(_parts(windows)):
            tokens = prompt_tokens[start * _WINDOWS_PER_CALL :][: len(part)]
            losses += _score(client, part, tokens)
            on_tick()
    return LevelLoss(level, tuple(losses))


def weighted_loss(levels: Sequence[LevelLoss]) -> float:
    """Return the mean loss in nats per token over the levels, by their weights."""
    total = sum(measured.level.weight for measured in levels)
    return sum(measured.mean * measured.level.weight for measured in levels) / total


def loss_increase_error(levels: Sequence[LevelLoss], full: LevelLoss) -> float:
    """Return the standard error of the weighted increase over full, paired by window."""
    total = sum(measured.level.weight for measured in levels)
    increases = [
        sum(m.window_losses[i] * m.level.weight for m in levels) / total - full.window_losses[i]
        for i in range(len(full.window_losses))
    ]
    return statistics.stdev(increases) / math.sqrt(len(increases))


def _parts(windows: Sequence[Window]) -> list[Sequence[Window]]:
    return [
        windows[start : start + _WINDOWS_PER_CALL]
        for start in range(0, len(windows), _WINDOWS_PER_CALL)
    ]


def _prefill(client: httpx2.Client, prompts: Sequence[str]) -> list[int]:
    """Leave the prompts' states in the prefix cache; return their lengths in tokens."""
    answers = _generate(client, {"text": list(prompts)})
    return [int(answer["meta_info"]["prompt_tokens"]) for answer in answers]


def _score(
    client: httpx2.Client, windows: Sequence[Window], prompt_tokens: Sequence[int]
) -> list[float]:
    body = {
        "text": [window.prompt + window.continuation for window in windows],
        "return_logprob": True,
        # One token earlier, so that the continuation's first token is scored too.
        "logprob_start_len": [tokens - 1 for tokens in prompt_tokens],
    }
    answers = _generate(client, body)
    return [
        _window_loss(answer["meta_info"], tokens)
        for answer, tokens in zip(answers, prompt_tokens, strict=True)
    ]


def _window_loss(meta: dict[str, Any], prompt_tokens: int) -> float:
    """Return the continuation's mean loss, after checking that its prompt came from the cache."""
    if meta["cached_tokens"] != prompt_tokens - 1:
        raise ServerRunError(
            f"a prompt of {prompt_tokens} tokens should have come from the prefix cache but its "
            f"last one, and {meta['cached_tokens']} did: start SGLang with its radix cache on"
        )
    # The first entry has no predecessor in this forward, hence no logprob.
    scored = [entry[0] for entry in meta["input_token_logprobs"][1:]]
    return -statistics.fmean(scored)


def _generate(client: httpx2.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    sampling = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
    response = client.post("/generate", json={**body, "sampling_params": sampling})
    if response.status_code != 200:
        raise ServerRunError(
            f"scoring held-out text, the server answered HTTP {response.status_code}: "
            f"{response.text[:200]}"
        )
    answers: list[dict[str, Any]] = response.json()
    return answers
