"""Reference model, training: `python -m sglang_alloc.reference.train [--family olmoe]`."""

import argparse
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sglang_alloc.reference.architecture import FAMILIES, reference_config
from sglang_alloc.reference.corpus import build_corpus
from sglang_alloc.reference.documents import DOMAINS, read_documents, standard_sources
from sglang_alloc.reference.exact_tasks import SYNTHETIC_DOMAIN, task_documents
from sglang_alloc.reference.model_folder import model_folder, write_model_folder
from sglang_alloc.reference.recipe import Recipe, reference_recipe
from sglang_alloc.reference.samples import read_all_samples
from sglang_alloc.reference.token_streams import (
    TokenStreams,
    load_streams,
    save_streams,
    streams_of,
    with_domain,
)
from sglang_alloc.reference.training_run import TrainingRun
from sglang_alloc.reference.training_state import HistoryRow

STEPS_PER_REPORT = 25
STEPS_PER_SAVE = 100
TASK_DOCUMENTS = (1_500, 60)  # to train on, held out


def train(
    run: TrainingRun, console: Console, *, stop_after: int | None = None, workers: int = 2
) -> bool:
    """Advance `run` until its recipe ends, `stop_after` steps are done, or SIGINT; save it.

    Returns whether the recipe has ended. `workers` micro-batches run at once: the result is the
    same with any number.
    """
    total = run.recipe.total_steps
    last = total if stop_after is None else min(total, stop_after)
    with (
        ThreadPoolExecutor(workers) as executor,
        _progress(console) as progress,
        InterruptFlag() as interrupt,
    ):
        task = progress.add_task("train", total=total, completed=run.step)
        while run.step < last and not interrupt.seen:
            run.advance(executor)
            saving = run.step % STEPS_PER_SAVE == 0 or run.complete
            if saving or run.step % STEPS_PER_REPORT == 0:
                progress.console.print(_report_line(run.report(measure_heldout=saving)))
            if saving:
                run.save()
            progress.update(task, completed=run.step)
    run.save()
    return run.complete


class InterruptFlag:
    """While entered, SIGINT only sets `seen`, so that the step in progress ends and is saved."""

    seen = False

    def __enter__(self) -> "InterruptFlag":
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, *_: object) -> None:
        self.seen = True


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _report_line(row: HistoryRow) -> str:
    heldout = " ".join(f"{name} {loss:.3f}" for name, loss in (row.heldout or {}).items())
    return (
        f"step {row.step} bytes {row.tokens} loss {row.train_loss:.3f} balance "
        f"{row.balance_loss:.2f} {row.tokens / row.seconds:.0f} bytes/s {heldout}"
    )


def run_streams(path: Path, console: Console, *, synthetic: bool = False) -> TokenStreams:
    """Return the text of the run that is under way, or this machine's, frozen in `path`."""
    if path.exists():
        return load_streams(path)
    console.print("reading this machine's text (about half a minute) ...")
    streams = streams_of(build_corpus(read_documents(standard_sources()), read_all_samples()))
    if synthetic:
        made = (task_documents(n, seed, heldout=seed > 0) for seed, n in enumerate(TASK_DOCUMENTS))
        streams = with_domain(streams, SYNTHETIC_DOMAIN, *made)
    for domain, splits in streams.manifest.items():
        part = splits["train"]
        console.print(f"{domain}: {part['documents']} documents, {part['bytes']} bytes to train on")
    missing = ", ".join(domain for domain in DOMAINS if domain not in streams.manifest)
    if missing:
        console.print(f"this machine has too little text for {missing}: going on without")
    save_streams(path, streams)
    return streams


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sglang_alloc.reference.train")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_moe")
    parser.add_argument("--out", type=Path, help="model folder (default: beside this script)")
    parser.add_argument("--work", type=Path, default=Path("out/reference"), help="saved runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--restart", action="store_true", help="forget a saved run")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="stop early, resumable")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train a family's reference model into its folder; exit status 130 when stopped early."""
    options = _options(arguments)
    console = Console(stderr=True)
    if options.device == "cpu":
        torch.set_num_threads(1)  # micro-batches are the parallelism: see training_step
    state_path = options.work / f"{options.family}.pt"
    streams_path = options.work / f"{options.family}_corpus.npz"
    if options.restart:
        state_path.unlink(missing_ok=True)
        streams_path.unlink(missing_ok=True)
    config = reference_config(options.family)
    recipe = replace(reference_recipe(options.family), seed=options.seed)
    streams = run_streams(streams_path, console, synthetic=recipe.synthetic_share > 0)
    run = TrainingRun(config, recipe, streams, state_path, device=options.device)
    if not train(run, console, stop_after=options.stop_after):
        console.print(f"stopped after step {run.step}; the same command goes on from there")
        return 130
    folder = options.out or model_folder(options.family)
    write_model_folder(folder, run.model.cpu(), recipe, streams.manifest, run.state())
    console.print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
