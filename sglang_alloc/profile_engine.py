"""Offline story, profiling: the one file that runs an engine. A real SGLang server with a table of
probes, the probe in force, and the losses of given tokens under it."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.errors import AllocError
from sglang_alloc.plugin_entry import TABLE_VARIABLE
from sglang_alloc.priority_floors import PRIORITY_FLOORS_VARIABLE
from sglang_alloc.profile_windows import Window
from sglang_alloc.server_runs.budget_override import BudgetOverride
from sglang_alloc.server_runs.engine_device import serves_on_cpu
from sglang_alloc.server_runs.owned_process import OwnedProcess, owned_process
from sglang_alloc.server_runs.server_process import (
    CPU_ARGUMENTS,
    CPU_ENVIRONMENT,
    OnWait,
    free_port,
    wait_until_ready,
)
from sglang_alloc.shared_table import SharedTable, publish_shared_table
from sglang_alloc.worker_settings import PROFILE_VARIABLE, ROUTING_VARIABLE

READY_TIMEOUT_SECONDS = 1800.0  # large checkpoints load for minutes
_OVERRIDE_SECONDS = 3600.0


class ProfileError(AllocError):
    """The server that is profiled answered with an error, or with what cannot be a loss."""


class Scored(NamedTuple):
    """Losses of each window's continuation, nats per token, and the tokens forwarded for them.

    `top_logprobs` holds, for each window and position, the likeliest tokens and their logprobs, if
    they were asked for.
    """

    losses: tuple[float, ...]
    forward_tokens: int
    top_logprobs: tuple[tuple[dict[int, float], ...], ...] = ()


class ProfiledServer:
    """A ready server, its table of probes, and what it is asked."""

    def __init__(self, url: str, table: SharedTable, process: OwnedProcess) -> None:
        self._client = httpx2.Client(base_url=url, timeout=1800.0, trust_env=False)
        self._table = table
        self._process = process
        self._override = BudgetOverride(
            table, limit_seconds=_OVERRIDE_SECONDS, actor="profile", on_wait=process.require_alive
        )

    def close(self) -> None:
        """Close the connection; the server is stopped by who started it."""
        self._client.close()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text by the server's own tokenizer, without special ones."""
        answer = self._post("/tokenize", {"prompt": list(texts), "add_special_tokens": False})
        tokens: list[list[int]] = answer["tokens"]
        return tokens

    def set_probe(self, probe: int) -> None:
        """Put a probe (its row number from 0) in force, and wait until the engine says so.

        Raises:
            ServerRunError: the engine does not acknowledge it.
        """
        self._override.set(probe + 1, probe + 1)

    def flush(self) -> None:
        """Empty the prefix cache."""
        self._post("/flush_cache", None, timeout=10)

    def prefill(self, windows: Sequence[Window]) -> int:
        """Run the prefixes, whose states stay in the prefix cache; return the tokens forwarded."""
        answers = self._generate({"input_ids": [list(window.prefix) for window in windows]})
        return sum(_forwarded(answer["meta_info"]) for answer in answers)

    def score(self, windows: Sequence[Window], top_tokens: int = 0) -> Scored:
        """Score each continuation in one forward on top of its cached prefix.

        Raises:
            ProfileError: the prefix did not come from the cache, or a loss is not a number.
        """
        body: dict[str, Any] = {
            "input_ids": [[*window.prefix, *window.continuation] for window in windows],
            "return_logprob": True,
            # One token earlier, so that the continuation's first token is scored too.
            "logprob_start_len": [len(window.prefix) - 1 for window in windows],
            "top_logprobs_num": top_tokens,
        }
        metas = [answer["meta_info"] for answer in self._generate(body)]
        for window, meta in zip(windows, metas, strict=True):
            _require_cached(window, meta)
        tops = tuple(_top_logprobs(meta) for meta in metas) if top_tokens else ()
        losses = tuple(self._loss(number, meta) for number, meta in enumerate(metas))
        return Scored(losses, sum(map(_forwarded, metas)), tops)

    def whole_losses(self, windows: Sequence[Window]) -> Scored:
        """Score every token of each window but its first, in one forward of the whole window."""
        body: dict[str, Any] = {
            "input_ids": [[*window.prefix, *window.continuation] for window in windows],
            "return_logprob": True,
            "logprob_start_len": 0,  # also keeps what is cached from being used
        }
        metas = [answer["meta_info"] for answer in self._generate(body)]
        losses = tuple(self._loss(number, meta) for number, meta in enumerate(metas))
        return Scored(losses, sum(map(_forwarded, metas)))

    def next_losses(self, prefixes: Sequence[Sequence[int]], following: Sequence[int]) -> Scored:
        """Return the loss of one following token after each prefix, all but its end cached."""
        body: dict[str, Any] = {
            "input_ids": [list(prefix) for prefix in prefixes],
            "return_logprob": True,
            "logprob_start_len": -1,
            "token_ids_logprob": [[token] for token in following],
        }
        metas = [answer["meta_info"] for answer in self._generate(body)]
        values = [meta["output_token_ids_logprobs"][0][0][0] for meta in metas]
        for number, value in enumerate(values):
            self._require_number(number, value)
        return Scored(tuple(-value for value in values), sum(map(_forwarded, metas)))

    def forwards(self) -> int:
        """Return how many forwards the engine has begun, as of its last report."""
        return max((rank.steps for rank in self._table.worker_counters()), default=0)

    def _loss(self, number: int, meta: dict[str, Any]) -> float:
        # The first entry has no predecessor in this forward, hence no logprob.
        scored = [entry[0] for entry in meta["input_token_logprobs"][1:]]
        for value in scored:
            self._require_number(number, value)
        return -statistics.fmean(scored)

    def _require_number(self, number: int, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            raise ProfileError(
                f"The engine gave a logprob of {value} in window {number} of a chunk: the model's "
                "logits are not numbers there. Serve it in another precision (--dtype) or check "
                "the checkpoint. What was measured before is kept."
            )

    def _generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        sampling = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        answers: list[dict[str, Any]] = self._post(
            "/generate", {**body, "sampling_params": sampling}
        )
        return answers

    def _post(self, path: str, body: dict[str, Any] | None, **parameters: Any) -> Any:
        try:
            response = self._client.post(path, json=body, params=parameters)
        except httpx2.TransportError as error:
            self._process.require_alive()
            raise ProfileError(
                f"The server did not answer {path}: {error}. Its log is {self._process.log_path}."
            ) from error
        if response.status_code != 200:
            raise ProfileError(
                f"The server answered {path} with HTTP {response.status_code}: "
                f"{response.text[:300].strip()}. Its log is {self._process.log_path}."
            )
        return None if body is None else response.json()


@contextlib.contextmanager
def profiled_server(
    model_path: Path,
    probes: BudgetTables,
    note: str,
    *,
    folder: Path,
    arguments: Sequence[str],
    on_wait: OnWait | None = None,
) -> Iterator[ProfiledServer]:
    """Serve the model under a table of probes for the duration of the block.

    `folder` receives the shared table, the server's log and what the engine records; `arguments`
    are SGLang's own.
    """
    table_path = folder / "probes.tbl"
    publish_shared_table(table_path, probes, mode_note=note)
    port, on_cpu = free_port(), serves_on_cpu(arguments)
    command = [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", str(model_path), "--port", str(port), "--host", "127.0.0.1"),
        "--disable-cuda-graph",
        *(CPU_ARGUMENTS if on_cpu else ()),
        *arguments,
    ]
    environment = {
        **(CPU_ENVIRONMENT if on_cpu else {}),
        TABLE_VARIABLE: str(table_path.absolute()),
        PROFILE_VARIABLE: str(folder.absolute()),
        ROUTING_VARIABLE: "",  # probes look at SGLang's slots
        PRIORITY_FLOORS_VARIABLE: "",  # they are budgets, and a table of probes has none
    }
    log_path = folder / "server.log"
    with owned_process("SGLang", command, log_path=log_path, env=environment) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, f"{url}/health", READY_TIMEOUT_SECONDS, on_wait)
        with SharedTable.open(table_path) as table:
            server = ProfiledServer(url, table, process)
            try:
                yield server
            finally:
                server.close()


def _forwarded(meta: dict[str, Any]) -> int:
    return int(meta["prompt_tokens"]) - int(meta["cached_tokens"])


def _require_cached(window: Window, meta: dict[str, Any]) -> None:
    expected, found = len(window.prefix) - 1, int(meta["cached_tokens"])
    if found != expected:
        raise ProfileError(
            f"A prefix of {len(window.prefix)} tokens should have come from the prefix cache but "
            f"its last one, and {found} did. Leave SGLang's radix cache on, with --page-size 1, "
            "and give it memory for a whole chunk (--mem-fraction-static, or a smaller --chunk)."
        )


def _top_logprobs(meta: dict[str, Any]) -> tuple[dict[int, float], ...]:
    positions = meta["input_top_logprobs"][1:]
    return tuple({int(e[1]): float(e[0]) for e in position} for position in positions)
