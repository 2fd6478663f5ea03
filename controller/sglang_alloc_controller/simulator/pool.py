"""Simulator, the command: cells in worker processes, the longest first, finished ones kept."""

import gc
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.simulator.cells import Cell, CellStore, Finished
from sglang_alloc_controller.simulator.law_names import LAWS, run_named
from sglang_alloc_controller.simulator.scenarios import named
from sglang_alloc_controller.simulator.timeline import timeline
from sglang_alloc_controller.simulator.world import World

# How often the progress is shown while nothing finishes.
_SHOW_SECONDS = 0.5
Progress = Callable[[float, str], None]
"""Called with the finished share of the work and with what is known of the time left."""

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")
_world: World


def relative_cost(cell: Cell) -> float:
    """Return how long a cell takes compared to others."""
    cost = {law.name: law.relative_cost for law in LAWS}
    return cost[cell.law] * named(cell.scenario).seconds


def simulate(world: World, cell: Cell) -> Finished:
    """Simulate one cell."""
    scenario = named(cell.scenario)
    plant_world = world if cell.gain == 1.0 else world.with_gain(cell.gain)
    run, score = run_named(cell.law, plant_world, scenario, cell.seed)
    return Finished(cell, score, timeline(run, world.settings_for(scenario).slo))


def run_cells(
    world: World, cells: Iterable[Cell], store: CellStore | None, workers: int, progress: Progress
) -> list[Finished]:
    """Return all cells in their order, those from the store and those simulated now.

    Interrupting it keeps what is finished.

    Raises:
        ConfigurationError: a result cannot be written, or a worker process died.
    """
    asked = list(cells)
    done: dict[Cell, Finished] = {}
    for cell in asked:
        kept = store.load(cell) if store else None
        if kept is not None:
            done[cell] = kept
    missing = sorted((cell for cell in asked if cell not in done), key=relative_cost, reverse=True)
    found = in_workers(
        world, simulate, missing, cost=relative_cost, workers=workers, progress=progress
    )
    for cell, finished in found:
        if store:
            store.save(finished)
        done[cell] = finished
    return [done[cell] for cell in asked]


def in_workers(
    world: World,
    function: Callable[[World, _Asked], _Answer],
    asked: Sequence[_Asked],
    *,
    cost: Callable[[_Asked], float],
    workers: int,
    progress: Progress,
) -> Iterator[tuple[_Asked, _Answer]]:
    """Call `function` for each of `asked` in worker processes; yield as they finish.

    `cost` is how long each takes compared to others. Progress is shown while nothing finishes too.

    Raises:
        ConfigurationError: a worker process died.
    """
    if not asked:
        return
    started, total, spent = time.monotonic(), sum(map(cost, asked)), 0.0
    with worker_processes(world, min(workers, len(asked))) as executor:
        of = {executor.submit(in_worker, function, one): one for one in asked}
        pending = set(of)
        while pending:
            finished, pending = wait(pending, _SHOW_SECONDS, FIRST_COMPLETED)
            for future in finished:
                spent += cost(of[future])
                yield of[future], _result(future)
            progress(spent / total, time_left(time.monotonic() - started, spent / total))


@contextmanager
def worker_processes(world: World, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield worker processes that end with the block, however it ends."""
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _initialise, (world,))
    try:
        yield executor
    except BaseException:
        processes = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    executor.shutdown()


def _initialise(world: World) -> None:
    global _world  # noqa: PLW0603 - each worker process has one world
    _world = world
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    gc.disable()  # a run leaves no cycles behind; looking for them took a tenth of its time


def in_worker(function: Callable[[World, _Asked], _Answer], asked: _Asked) -> _Answer:
    """In a process of `worker_processes`: call `function` with its world."""
    return function(_world, asked)


def _result(future: Future[_Answer]) -> _Answer:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ConfigurationError(
            "A worker process died, perhaps for want of memory. Use fewer with --workers, and run "
            "the same command again: what is finished is kept."
        ) from error


def time_left(spent_seconds: float, share: float) -> str:
    if share <= 0:
        return "time left not known yet"
    left = spent_seconds * (1 - share) / share
    minutes, seconds = divmod(5 * round(left / 5), 60)
    return f"about {minutes} min {seconds:02d} s left" if minutes else f"about {seconds} s left"
