"""Bench: measure, write latency.csv with what it was measured on, return the table."""

from __future__ import annotations

import shlex

from rich.console import Console

from sglang_alloc.bench.latency import LatencyOptions, latency_stages, measure_latency
from sglang_alloc.bench.summary import markdown, write_csv
from sglang_alloc.server_runs import machine
from sglang_alloc.server_runs.progress import StageProgress


def run_bench(options: LatencyOptions, console: Console) -> str:
    """Serve and measure, write latency.csv into the folder, return the results as Markdown.

    Raises:
        AllocError: a server did not start, or not answer as it should; nothing is written.
    """
    servers = 2 if options.stock else 1
    progress = StageProgress(latency_stages(options.rounds, servers), console)
    with progress.shown():
        rows = measure_latency(options, progress)
    write_csv(options.out / "latency.csv", rows, facts(options))
    return markdown(rows)


def facts(options: LatencyOptions) -> dict[str, object]:
    """Return what every row of the CSV says besides its figures."""
    return {
        "mode": options.mode,
        "routing": options.routing,
        "model": options.model.resolve().name,
        "prefill_prompt_tokens": options.sizes.prompt_tokens,
        "decode_prompt_tokens": options.sizes.decode_prompt_tokens,
        "decode_steps": options.sizes.decode_steps,
        "server_arguments": shlex.join(options.server_arguments),
        **machine.gpu_facts(on_cpu=options.on_cpu),
        **machine.row_facts(),
    }
