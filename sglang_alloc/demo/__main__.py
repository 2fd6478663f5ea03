"""Demo: `python -m sglang_alloc.demo` serves one trace three times and writes a report.

At full quality, under the controller, and at full quality again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sglang_alloc.demo.report import write_report
from sglang_alloc.demo.run import STAGES, WRITE, DemoOptions, run_demo
from sglang_alloc.errors import AllocError
from sglang_alloc.server_runs.interruption import sigterm_interrupts
from sglang_alloc.server_runs.progress import StageProgress
from sglang_alloc.server_runs.reference_files import add_model_arguments, heldout_texts, tables_path

RUNS = ("full_before", "controlled", "full_after")
DONE, FAILED, INTERRUPTED = 0, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 when the report is written and no request failed."""
    given = _parse(arguments)
    console = Console()
    progress = StageProgress(STAGES, console)
    try:
        options = DemoOptions(
            model=given.model,
            tables=tables_path(given),
            texts=tuple(heldout_texts(given)),
            out=given.out,
            mode=given.mode,
            seed=given.seed,
        )
        with sigterm_interrupts(), progress.shown():
            result = run_demo(options, progress)
            with progress.stage(WRITE):
                report = write_report(result, options.out)
    except AllocError as error:
        console.print(f"The demo stopped: {error}", markup=False, highlight=False, soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        console.print(_kept(given.out), markup=False, highlight=False, soft_wrap=True)
        return INTERRUPTED
    _print_summary(console, report, options.out)
    errors: int = sum(report[name]["errors"] for name in RUNS)
    return DONE if errors == 0 else FAILED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sglang_alloc.demo", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for results")
    return parser.parse_args(arguments)


def _kept(out: Path) -> str:
    kept = sorted(path.name for path in out.glob("*") if path.is_file())
    return (
        "Interrupted: the server and the controller are stopped and no report was written. "
        f"Kept in {out}: {', '.join(kept) or 'nothing'}."
    )


def _print_summary(console: Console, report: dict[str, Any], out: Path) -> None:
    console.print(report["verdict"], markup=False, highlight=False)
    console.print(report["drift"]["sentence"], markup=False, highlight=False)
    for name in RUNS:
        run = report[name]
        console.print(
            f"  {name:<11}  {run['slo_attainment_ratio']:6.1%} of {run['requests']} requests "
            f"within both SLOs, TTFT p95 {run['ttft_seconds']['p95']:.2f} s, "
            f"ITL p95 {1000 * run['itl_seconds']['p95']:.0f} ms, {run['errors']} errors",
            markup=False,
            highlight=False,
        )
    for name in ("report.html", "report.json"):
        console.print(f"  {(out / name).resolve()}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
