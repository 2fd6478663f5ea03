"""Control story, last step: the selector word, across replacements of the shared table."""

from collections.abc import Callable
from pathlib import Path

from sglang_alloc.errors import AllocError
from sglang_alloc.shared_table import (
    Override,
    Selector,
    SelectorWriter,
    SharedTable,
    WorkerCounters,
    is_newer_generation,
)


class TableLink:
    """The shared table that is at the path now, and the right to write its selector."""

    def __init__(self, path: Path, accept: Callable[[SharedTable], None]) -> None:
        """Open the table at `path` and become its writer.

        `accept` is called with each table before it is used and raises if it does not fit.

        Raises:
            SharedTableError: no usable table.
            TableInUseError: another process writes it.
            ConfigurationError: `accept` refused.
        """
        self._path = path
        self._accept = accept
        self.table = SharedTable.open(path)
        try:
            accept(self.table)
            self._writer = SelectorWriter.acquire(self.table)
        except AllocError:
            self.table.close()
            raise

    def follow_replacement(self) -> bool:
        """Move to a new publication at the path, if there is one; return whether it moved.

        While the path is empty or holds something unusable the old table stays in use, because a
        running server still reads that one.

        Raises:
            SharedTableError, ConfigurationError: what is there now cannot be used.
            TableInUseError: another process took the new one; this writer is out of work.
        """
        if self.table.is_current() or not self._path.exists():
            return False
        replacement = SharedTable.open(self._path)
        if replacement.publication_id == self.table.publication_id:
            replacement.close()
            return False
        try:
            self._accept(replacement)
        except AllocError:
            replacement.close()
            raise
        self.close()
        self.table = replacement
        self._writer = SelectorWriter.acquire(replacement)
        return True

    def selector(self) -> Selector:
        """Return the budgets in the selector."""
        return self.table.selector()

    def override(self, now_ns: int) -> Override | None:
        """Return the override in force, if any."""
        return self.table.override(now_ns)

    def clear_override(self) -> None:
        """End the override in force."""
        self.table.clear_override()

    def write(self, prefill_budget: int, decode_budget: int) -> bool:
        """Write the budgets if they differ from the selector's; return whether they did."""
        selector = self.table.selector()
        if (selector.prefill_budget, selector.decode_budget) == (prefill_budget, decode_budget):
            return False
        self._writer.write(prefill_budget, decode_budget)
        return True

    def beat(self, now_ns: int) -> None:
        """Tell the workers that this controller lives."""
        self._writer.beat(now_ns)

    def slowest_worker(self) -> WorkerCounters | None:
        """Return the counters of the rank that is furthest behind; None: no worker yet."""
        slowest: WorkerCounters | None = None
        for worker in self.table.worker_counters():
            if slowest is None or is_newer_generation(
                slowest.acknowledged_generation, worker.acknowledged_generation
            ):
                slowest = worker
        return slowest

    def leave_at_full_quality(self) -> None:
        """Write full quality, give the right to write back and close the table."""
        try:
            self.write(self.table.shape.budget_max, self.table.shape.budget_max)
        finally:
            self.close()

    def close(self) -> None:
        """Give the right to write back and close the table; the budgets stay."""
        self._writer.close()
        self.table.close()
