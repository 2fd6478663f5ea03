"""Bench: from what the command line asks for to what is served and measured, checked beforehand."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.allocation_mode import default_mode, require_support
from sglang_alloc.bench.latency import Case, LatencyOptions, budget_cases
from sglang_alloc.bench.timing import ON_CPU, ON_GPU, Sizes
from sglang_alloc.budget_tables import BudgetTables, load_budget_tables
from sglang_alloc.cli_set import parse_budget
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.launch_checks import require_plugin_allowed, require_same_model, require_sglang
from sglang_alloc.server_runs.engine_device import serves_on_cpu
from sglang_alloc.server_runs.reference_files import MODEL, read_heldout
from sglang_alloc.shared_table import TableShape

# What the bench chooses itself; given again behind `--` it would time another server, or none.
OURS = ("--model-path", "--model", "--port")


class Asked(NamedTuple):
    """What the command line gives; None: the default, which may depend on the device."""

    model_path: Path | None
    tables: Path | None
    texts: Sequence[Path]
    mode: str | None
    routing: str
    stock: bool | None
    budgets: Sequence[str]
    decode_batches: tuple[int, ...] | None
    prefill_batches: tuple[int, ...] | None
    prompt_tokens: int | None
    decode_steps: int | None
    rounds: int
    seed: int
    out: Path
    arguments: tuple[str, ...]
    """SGLang's own."""


def make_options(
    asked: Asked, on_cpu_given: Callable[[Sequence[str]], bool] = serves_on_cpu
) -> LatencyOptions:
    """Check what can be checked before a server is started, and fill in the defaults.

    Raises:
        AllocError: no supported SGLang, no tables of this model that serve the mode or hold the
            budgets, no text, or an argument of SGLang's that the bench chooses itself.
    """
    _require_not_ours(asked.arguments)
    require_sglang()
    require_plugin_allowed(os.environ)
    model = asked.model_path or MODEL
    tables = load_budget_tables(asked.tables or model / "budget_tables.npz")
    require_same_model(str(model), tables.fingerprint, tables.model_id)
    mode = asked.mode or default_mode(tables.arrays().__contains__)
    require_support(mode, tables.arrays().__contains__, tables.model_id)
    on_cpu = on_cpu_given(asked.arguments)
    return LatencyOptions(
        model=model,
        tables=tables,
        texts=tuple(read_heldout(asked.texts)),
        mode=mode,
        routing=asked.routing,
        cases=_cases(tables, asked.budgets),
        sizes=_sizes(asked, ON_CPU if on_cpu else ON_GPU),
        server_arguments=_server_arguments(model, asked.arguments, on_cpu),
        on_cpu=on_cpu,
        stock=on_cpu if asked.stock is None else asked.stock,
        rounds=asked.rounds,
        seed=asked.seed,
        out=asked.out,
    )


def _require_not_ours(arguments: Sequence[str]) -> None:
    found = [name for name in (part.partition("=")[0] for part in arguments) if name in OURS]
    if found:
        raise ConfigurationError(
            f"{found[0]} stands behind `--`, and the bench chooses the port itself and takes the "
            "model before `--`: leave it out there, and give the model with --model-path."
        )


def _cases(tables: BudgetTables, budgets: Sequence[str]) -> tuple[Case, ...]:
    """Return full and the budgets asked for, largest first, or the default ones."""
    shape = TableShape(
        tables.num_layers,
        tables.top_k,
        tables.num_experts,
        tables.budget_min,
        tables.budget_max,
    )
    if not budgets:
        return tuple(budget_cases(shape))
    named = {parse_budget(text, shape): text for text in budgets} | {shape.budget_max: "full"}
    return tuple((named[number], number) for number in sorted(named, reverse=True))


def _sizes(asked: Asked, default: Sizes) -> Sizes:
    return Sizes(
        decode_batches=asked.decode_batches or default.decode_batches,
        prefill_batches=asked.prefill_batches or default.prefill_batches,
        prompt_tokens=asked.prompt_tokens or default.prompt_tokens,
        decode_steps=asked.decode_steps or default.decode_steps,
    )


def _server_arguments(model: Path, theirs: Sequence[str], on_cpu: bool) -> tuple[str, ...]:
    """Return SGLang's arguments; what the caller gives comes last and counts."""
    # The reference model is measured in the precision that a CPU computes fastest.
    dtype = ("--dtype", "float32") if on_cpu and model.resolve() == MODEL.resolve() else ()
    # A prompt that is drawn twice must be computed twice.
    return (*dtype, "--disable-radix-cache", *theirs)
