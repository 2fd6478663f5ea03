"""Bench: how long the server takes to prefill and to decode a batch, timed from outside."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import httpx2

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.server_runs.errors import ServerRunError

LOADS_PATH = "/v1/loads?include=core"
_SHORT_PROMPT_TOKENS = 32
_WARM_UP_STEPS = 4
_REPEATS = 4


class Sizes(NamedTuple):
    """What is timed: requests in a batch by phase, and tokens.

    A prefill batch has prompts of `prompt_tokens`. A decode batch runs for `decode_steps` behind
    prompts of 32 tokens, so that their prefill is small beside it.
    """

    decode_batches: tuple[int, ...]
    prefill_batches: tuple[int, ...]
    prompt_tokens: int
    decode_steps: int
    decode_prompt_tokens: int = _SHORT_PROMPT_TOKENS


ON_CPU = Sizes((1, 8, 32), (1, 8, 32), prompt_tokens=256, decode_steps=32)
# Prefill up to the tokens of SGLang's usual chunk; more steps, because each takes milliseconds.
ON_GPU = Sizes((1, 8, 32, 128), (1, 2, 4, 8), prompt_tokens=1024, decode_steps=128)


class Timing(NamedTuple):
    """One measurement; `seconds` is per batch of prompts (prefill) or per decode step."""

    phase: str  # "prefill" or "decode"
    concurrency: int
    seconds: float


class Prompts:
    """Prompts of a number of tokens, cut at random from held-out text."""

    def __init__(self, tokens: Sequence[int], generator: random.Random) -> None:
        """Cut from `tokens`, which are ids."""
        self._tokens, self._generator = tokens, generator

    def cut(self, batch: int, length: int) -> list[list[int]]:
        """Return `batch` prompts of `length` ids.

        Raises:
            ConfigurationError: the text is shorter than one prompt.
        """
        if len(self._tokens) < length:
            raise ConfigurationError(
                f"Prompts of {length} tokens were asked for, and the text has only "
                f"{len(self._tokens)}: give longer ones with --text, or a smaller --prompt-tokens."
            )
        starts = [self._generator.randint(0, len(self._tokens) - length) for _ in range(batch)]
        return [list(self._tokens[start : start + length]) for start in starts]


def measure_timings(
    client: httpx2.Client,
    sizes: Sizes,
    prompts: Prompts,
    clock: Callable[[], float] = time.perf_counter,
    *,
    repeats: int = _REPEATS,
) -> list[Timing]:
    """Time prefill and decode at each batch size, each in one batch of as many requests.

    Prefill is the time until all prompts of the batch have their first token. Decode is the
    difference between long and short answers to short prompts, per step: HTTP and prefill are in
    both and cancel. Prompts are text, so routing is what it is in use, and are cut anew for each
    batch. A machine that does other work may take longer for the short answers: such a difference
    is no time of a step, and is measured again after all sizes, `repeats` times at most.

    Raises:
        ServerRunError: the short answers took longer each time, or the server does not answer.
    """

    def batch_seconds(batch: int, prompt_tokens: int, tokens: int) -> float:
        cut = prompts.cut(batch, prompt_tokens)
        started = clock()
        generate(client, cut, tokens)
        return clock() - started

    def step_timing(batch: int) -> Timing:
        short = batch_seconds(batch, short_prompt, 1)
        long = batch_seconds(batch, short_prompt, 1 + steps)
        return Timing("decode", batch, (long - short) / steps)

    short_prompt, steps = sizes.decode_prompt_tokens, sizes.decode_steps
    batch_seconds(1, short_prompt, 4)  # the first batch after a pause is not measured
    timings = []
    for batch in sizes.prefill_batches:
        seconds = batch_seconds(batch, sizes.prompt_tokens, 1)
        timings.append(Timing("prefill", batch, seconds))
    decode = [step_timing(batch) for batch in sizes.decode_batches]
    for number, batch in enumerate(sizes.decode_batches):
        left = repeats
        while decode[number].seconds <= 0 and left:
            decode[number], left = step_timing(batch), left - 1
        if decode[number].seconds <= 0 and repeats:
            raise ServerRunError(
                f"{steps} decode steps of {batch} requests took no longer than none, "
                f"{1 + repeats} times: this machine does other work. Stop that, or give more "
                "--decode-steps"
            )
    return timings + decode


def warm_up(client: httpx2.Client, sizes: Sizes, prompts: Prompts) -> None:
    """Run each size once, untimed: kernels are compiled when a size first occurs."""
    sizes = sizes._replace(decode_steps=_WARM_UP_STEPS)
    measure_timings(client, sizes, prompts, repeats=0)


def require_room(client: httpx2.Client, sizes: Sizes) -> None:
    """Raise `ConfigurationError` when the server would not run the largest batch at once.

    Nothing is said where the server does not tell how many it runs.
    """
    response = client.get(LOADS_PATH)
    ranks = response.json().get("loads", []) if response.status_code == 200 else []
    limits = [rank["max_running_requests"] for rank in ranks if rank.get("max_running_requests")]
    largest = max(*sizes.decode_batches, *sizes.prefill_batches)
    if limits and largest > min(limits):
        raise ConfigurationError(
            f"A batch of {largest} requests was asked for, and this server runs {min(limits)} at "
            "once. Give smaller sizes with --decode-batches and --prefill-batches, or the server "
            "more with --max-running-requests or memory behind `--`."
        )


def tokenize(client: httpx2.Client, texts: Sequence[str]) -> list[int]:
    """Return the ids of all texts in a row, by the server's own tokenizer."""
    answer = _answer(client, "/tokenize", {"prompt": list(texts), "add_special_tokens": False})
    return [token for tokens in answer["tokens"] for token in tokens]


def generate(
    client: httpx2.Client, prompts: Sequence[str] | Sequence[Sequence[int]], tokens: int
) -> None:
    """Let the server answer all prompts, text or ids, as one batch with exactly `tokens` each."""
    sampling = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    name = "text" if isinstance(prompts[0], str) else "input_ids"
    body = {name: list(prompts), "sampling_params": sampling}
    answers: list[dict[str, Any]] = _answer(client, "/generate", body)
    produced = {int(answer["meta_info"]["completion_tokens"]) for answer in answers}
    if produced != {tokens}:
        raise ServerRunError(f"{tokens} output tokens were asked for and {sorted(produced)} came")


def _answer(client: httpx2.Client, path: str, body: dict[str, Any]) -> Any:
    try:
        response = client.post(path, json=body)
    except httpx2.TransportError as error:
        raise ServerRunError(f"the server did not answer {path}: {error}") from error
    if response.status_code != 200:
        raise ServerRunError(
            f"the server answered {path} with HTTP {response.status_code}: {response.text[:200]}"
        )
    return response.json()
