"""Control story, last step: the budgets in the shared table, across replacements of it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sglang_alloc.errors import AllocError
from sglang_alloc.shared_table import (
    CalmBudgets,
    CalmTokens,
    Override,
    Selector,
    SelectorWriter,
    SharedTable,
    WorkerCounters,
    is_newer_generation,
)
from sglang_alloc.shared_table_liveness import is_alive

_Bounds = TypeVar("_Bounds")


class TableLink:
    """The shared table that is at the path now, and the right to write its selector."""

    def __init__(self, path: Path, accept: Callable[[SharedTable], None]) -> None:
        """Open the table at `path` and become its writer.

        `accept` is called with the table before it is used and raises if it does not fit.

        Raises:
            SharedTableError: no usable table.
            TableInUseError: another process writes it.
            ConfigurationError: `accept` refused.
        """
        self._path = path
        self.table = SharedTable.open(path)
        try:
            accept(self.table)
            self._writer = SelectorWriter.acquire(self.table)
        except AllocError:
            self.table.close()
            raise

    def follow_replacement(self, accept: Callable[[SharedTable], _Bounds]) -> _Bounds | None:
        """Move to a new publication at the path, if there is one; None: there is none.

        `accept` is called with the new table before it is used, and raises if it does not fit; what
        it returns is returned. While the path is empty or holds something unusable the old table
        stays in use, because a running server still reads that one.

        Raises:
            SharedTableError, ConfigurationError: what is there now cannot be used.
            TableInUseError: another process took the new one; this writer is out of work.
        """
        if self.table.is_current() or not self._path.exists():
            return None
        replacement = SharedTable.open(self._path)
        if replacement.publication_id == self.table.publication_id:
            replacement.close()
            return None
        try:
            bounds = accept(replacement)
            writer = self._writer_of(replacement)
        except BaseException:
            replacement.close()
            raise
        self.table.close()
        self.table, self._writer = replacement, writer
        return bounds

    def _writer_of(self, replacement: SharedTable) -> SelectorWriter:
        """Take the right to write, which belongs to the path, from the present table's writer."""
        self._writer.close()
        try:
            return SelectorWriter.acquire(replacement)
        except AllocError:
            self._writer = SelectorWriter.acquire(self.table)
            raise

    def selector(self) -> Selector:
        """Return the budgets in the selector.

        Raises:
            SharedTableError: the file is lost; to read on would end the process.
        """
        self.table.require_intact()
        return self.table.selector()

    def override(self, now_ns: int) -> Override | None:
        """Return the override in force, if any."""
        return self.table.override(now_ns)

    def clear_override(self) -> None:
        """End the override in force."""
        self.table.clear_override()

    def calm_budgets(self) -> CalmBudgets | None:
        """Return what stands beside the selector for calm steps; None: the same budgets.

        Raises:
            SharedTableError: the file is lost; to read on would end the process.
        """
        self.table.require_intact()
        return self.table.calm_budgets()

    def write(
        self, prefill_budget: int, decode_budget: int, calm: CalmBudgets | None = None
    ) -> bool:
        """Write the budgets if they differ from those in the table; return whether they did.

        `calm` are those of calm steps, None for the same ones.
        """
        selector = self.selector()
        there = (selector.prefill_budget, selector.decode_budget, self.table.calm_budgets())
        if there == (prefill_budget, decode_budget, calm):
            return False
        self._writer.write(prefill_budget, decode_budget, calm)
        return True

    def beat(self, now_ns: int) -> None:
        """Tell the workers that this controller lives."""
        self._writer.beat(now_ns)

    def slowest_worker(self, now_ns: int) -> WorkerCounters | None:
        """Return the counters of the living rank that is furthest behind; None: no rank lives.

        The slots of a server that is gone keep what they held.
        """
        slowest: WorkerCounters | None = None
        for worker in self.table.worker_counters():
            if not is_alive(worker, now_ns):
                continue
            if slowest is None or is_newer_generation(
                slowest.acknowledged_generation, worker.acknowledged_generation
            ):
                slowest = worker
        return slowest

    def calm_tokens(self) -> list[CalmTokens]:
        """Return how many tokens each rank served, zeros where it does not count them."""
        return self.table.calm_tokens()

    def leave_at_full_quality(self) -> Override | None:
        """Write full quality, give the right to write back and close the table.

        Return the override in force, if any: a person's order outlives the controller.
        """
        try:
            self.write(self.table.shape.budget_max, self.table.shape.budget_max)
            return self.table.override(time.monotonic_ns())
        finally:
            self.close()

    def close(self) -> None:
        """Give the right to write back and close the table; the budgets stay."""
        self._writer.close()
        self.table.close()
