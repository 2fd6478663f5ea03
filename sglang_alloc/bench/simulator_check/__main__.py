"""Simulator check: `python -m sglang_alloc.bench.simulator_check measure | compare`.

`measure` takes about five minutes on a quiet machine and leaves bench.csv and served.json in a
folder; `compare` runs the simulator on them and writes errors.csv, a table and a figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sglang_alloc.bench.simulator_check.compare import compare_folder
from sglang_alloc.bench.simulator_check.files import write_served
from sglang_alloc.bench.simulator_check.serve import SERVER_ARGUMENTS, STAGES, Options, measure
from sglang_alloc.demo.calibration import RequestShape
from sglang_alloc.demo.stages import SHAPE
from sglang_alloc.errors import AllocError
from sglang_alloc.server_runs import machine
from sglang_alloc.server_runs.interruption import sigterm_interrupts
from sglang_alloc.server_runs.progress import StageProgress
from sglang_alloc.server_runs.reference_files import add_model_arguments, heldout_texts, tables_path

DONE, FAILED, INTERRUPTED = 0, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or compare; return 0 when the results are written."""
    given = _parse(arguments)
    console = Console(stderr=True)
    try:
        if given.step == "measure":
            _measure(given, console)
        print(compare_folder(given.out, tables_path(given), given.bench))
    except AllocError as error:
        console.print(f"The check stopped: {error}", markup=False, highlight=False, soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        console.print("Interrupted: the server is stopped, nothing was written.")
        return INTERRUPTED
    return DONE


def _measure(given: argparse.Namespace, console: Console) -> None:
    options = Options(
        model=given.model,
        tables=tables_path(given),
        texts=tuple(heldout_texts(given)),
        mode=given.mode,
        seed=given.seed,
        out=given.out,
        shape=RequestShape(given.prompt_bytes, given.output_tokens),
    )
    progress = StageProgress(STAGES, console)
    with sigterm_interrupts(), progress.shown():
        served = measure(options, _facts(options), progress)
    write_served(options.out / "served.json", served)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_alloc.bench.simulator_check", description=__doc__
    )
    parser.add_argument("step", choices=("measure", "compare"))
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("out/simulator-check"), help="folder")
    parser.add_argument("--bench", type=Path, help="bench CSV (default: the folder's own)")
    parser.add_argument("--prompt-bytes", type=int, default=SHAPE.prompt_bytes)
    parser.add_argument("--output-tokens", type=int, default=SHAPE.output_tokens)
    return parser.parse_args(arguments)


def _facts(options: Options) -> dict[str, object]:
    return {
        "mode": options.mode,
        "model": options.model.name,
        "prompt_bytes": options.shape.prompt_bytes,
        "output_tokens": options.shape.output_tokens,
        "server_arguments": " ".join(SERVER_ARGUMENTS),
        **machine.row_facts(),
    }


if __name__ == "__main__":
    sys.exit(main())
