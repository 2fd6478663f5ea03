"""Bench: `python -m sglang_alloc.bench latency` writes out/bench/latency.csv and a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sglang_alloc.bench.latency import (
    SERVER_ARGUMENTS,
    LatencyOptions,
    latency_stages,
    measure_latency,
)
from sglang_alloc.bench.summary import markdown, write_csv
from sglang_alloc.bench.timing import DECODE_PROMPT_BYTES, DECODE_STEPS, PREFILL_PROMPT_BYTES
from sglang_alloc.errors import AllocError
from sglang_alloc.server_runs import machine
from sglang_alloc.server_runs.interruption import sigterm_interrupts
from sglang_alloc.server_runs.progress import StageProgress
from sglang_alloc.server_runs.reference_files import add_model_arguments, heldout_texts, tables_path

DONE, FAILED, INTERRUPTED = 0, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a bench; return 0 when its results are written."""
    given = _parse(arguments)
    console = Console(stderr=True)
    progress = StageProgress(latency_stages(given.rounds), console)
    try:
        options = LatencyOptions(
            model=given.model,
            tables=tables_path(given),
            texts=tuple(heldout_texts(given)),
            mode=given.mode,
            rounds=given.rounds,
            seed=given.seed,
            out=given.out,
        )
        with sigterm_interrupts(), progress.shown():
            rows = measure_latency(options, progress)
    except AllocError as error:
        console.print(f"The bench stopped: {error}", markup=False, highlight=False, soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        console.print("Interrupted: both servers are stopped, nothing was written.")
        return INTERRUPTED
    path = options.out / "latency.csv"
    write_csv(path, rows, _facts(options))
    print(markdown(rows))
    console.print(f"Written to {path.resolve()}", markup=False, highlight=False, soft_wrap=True)
    return DONE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sglang_alloc.bench", description=__doc__)
    parser.add_argument("bench", nargs="?", default="latency", choices=("latency",))
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for results")
    parser.add_argument("--rounds", type=_positive, default=5, help="times that all is measured")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of rounds: use 1 or more")
    return number


def _facts(options: LatencyOptions) -> dict[str, object]:
    return {
        "mode": options.mode,
        "model": options.model.name,
        "prefill_prompt_tokens": PREFILL_PROMPT_BYTES,
        "decode_prompt_tokens": DECODE_PROMPT_BYTES,
        "decode_steps": DECODE_STEPS,
        "server_arguments": " ".join(SERVER_ARGUMENTS),
        **machine.row_facts(),
    }


if __name__ == "__main__":
    sys.exit(main())
