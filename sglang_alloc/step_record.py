"""A log of (step, generation) per rank, by which tests prove that all ranks switch together."""

from __future__ import annotations

from pathlib import Path

from sglang_alloc.shared_table import Selection


class StepRecord:
    """Appends one line per forward: step, source, generation, phase, budgets, tokens."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank{rank}.csv").open("w", buffering=1)
        self._file.write("step,source,generation,phase,prefill_budget,decode_budget,num_tokens\n")

    def add(self, step: int, selection: Selection, phase: str | None, num_tokens: int) -> None:
        """Write the line of one forward."""
        self._file.write(
            f"{step},{selection.source},{selection.generation},{phase},"
            f"{selection.prefill_budget},{selection.decode_budget},{num_tokens}\n"
        )

    def close(self) -> None:
        """Close the log."""
        self._file.close()
