"""Offline story, judging: run measurements several at once, with progress, and keep each."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sglang_alloc.evaluation.journal import EvaluationJournal
from sglang_alloc.evaluation.points import Point


class Job(NamedTuple):
    """A point that is to be measured, by its name in the journal."""

    rule: str
    budget: int
    measure: Callable[[], Point]


def run_jobs(
    jobs: Sequence[Job], journal: EvaluationJournal, console: Console, workers: int
) -> None:
    """Measure what the journal does not hold yet; on an interrupt, finished points are kept."""
    missing = [job for job in jobs if (job.rule, job.budget) not in journal.points]
    columns = (TextColumn("{task.completed}/{task.total} points"), BarColumn(),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with ThreadPoolExecutor(workers) as executor, Progress(*columns, console=console) as progress:
        bar = progress.add_task("evaluate", total=len(jobs), completed=len(jobs) - len(missing))
        futures = [executor.submit(job.measure) for job in missing]
        try:
            for future in as_completed(futures):
                journal.add(future.result())
                progress.advance(bar)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
