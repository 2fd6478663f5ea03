"""A log of each forward of a rank: which budget it had, how many tokens, and when it began.

Tests prove by it that all ranks switch together, the simulator's check what a step took in service.
"""

from __future__ import annotations

from pathlib import Path

from sglang_alloc.shared_table import Selection

COLUMNS = (
    *("step", "source", "generation", "phase"),
    *("prefill_budget", "decode_budget", "num_tokens", "begun_ns"),
)


class StepRecord:
    """Appends one line per forward: step, source, generation, phase, budgets, tokens, begin."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank{rank}.csv").open("w", buffering=1)
        self._file.write(f"{','.join(COLUMNS)}\n")

    def add(
        self, step: int, selection: Selection, phase: str | None, num_tokens: int, begun_ns: int
    ) -> None:
        """Write the line of one forward, which began at `begun_ns` of the monotonic clock."""
        self._file.write(
            f"{step},{selection.source},{selection.generation},{phase},"
            f"{selection.prefill_budget},{selection.decode_budget},{num_tokens},{begun_ns}\n"
        )

    def close(self) -> None:
        """Close the log."""
        self._file.close()
