"""A log of each forward of a rank: which budgets it obeyed, how many tokens, and when it began.

Tests prove by it that all ranks switch together, the demo which budgets its requests were served
at, the simulator's check what a step took in service. `server_runs/served_steps.py` reads it.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from sglang_alloc.shared_table import Selection

logger = logging.getLogger("sglang_alloc")

COLUMNS = (
    *("step", "source", "generation", "phase"),
    *("prefill_budget", "decode_budget", "num_tokens"),
    *("is_calm", "begun_ns"),
)


class StepRecord:
    """Appends one line per forward: step, source, generation, phase, budgets, tokens, calm, begin.

    It ends with the first line that cannot be written, as on a full disk: requests go on.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank{rank}.csv").open("w", buffering=1)
        self._file.write(f"{','.join(COLUMNS)}\n")
        self._is_ended = False

    def add(
        self,
        step: int,
        selection: Selection,
        phase: str | None,
        num_tokens: int,
        begun_ns: int,
        *,
        is_calm: bool = False,
    ) -> None:
        """Write the line of one forward, which began at `begun_ns` of the monotonic clock.

        `selection` has the budgets that it obeyed, which differ from the acknowledged ones where
        calm steps have budgets of their own.
        """
        if self._is_ended:
            return
        try:
            self._file.write(
                f"{step},{selection.source},{selection.generation},{phase},"
                f"{selection.prefill_budget},{selection.decode_budget},{num_tokens},"
                f"{int(is_calm)},{begun_ns}\n"
            )
        except OSError as error:
            self._is_ended = True
            logger.warning("sglang-alloc ends the step record %s: %s", self._file.name, error)

    def close(self) -> None:
        """Close the log."""
        with contextlib.suppress(OSError):  # what could not be written
            self._file.close()
