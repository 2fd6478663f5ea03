"""Budgets that a command holds on its server by the shared table's override, as a person would."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx2

from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.shared_table import SharedTable
from sglang_alloc.shared_table_words import source_code

LIMIT_SECONDS = 600.0
OVERRIDE_CODE = source_code("override")
_ACKNOWLEDGE_SECONDS = 60.0  # a busy server acknowledges between two forwards


class BudgetOverride:
    """Puts budgets in force on the server, and takes them back."""

    def __init__(
        self,
        table: SharedTable,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        limit_seconds: float = LIMIT_SECONDS,
        actor: str = "demo",
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Hold what is set for `limit_seconds` at most; `on_wait` is called while waiting."""
        self._table = table
        self._actor = actor
        self._limit_seconds = limit_seconds
        self._sleep = sleep
        self._clock = clock
        self._on_wait = on_wait

    def set(self, prefill_budget: int, decode_budget: int) -> None:
        """Put budgets in force; return when the leading rank has acknowledged them.

        Raises:
            ServerRunError: it does not.
        """
        now_ns = time.monotonic_ns()
        deadline_ns = now_ns + int(self._limit_seconds * 1e9)
        self._table.set_override(prefill_budget, decode_budget, deadline_ns, self._actor)
        override = self._table.override(now_ns)
        assert override is not None
        give_up = self._clock() + _ACKNOWLEDGE_SECONDS
        while not self._is_acknowledged(override.generation):
            self._on_wait()
            if self._clock() > give_up:
                raise ServerRunError(
                    f"budgets {prefill_budget}/{decode_budget} were set by override in "
                    f"{self._table.path}, and after {_ACKNOWLEDGE_SECONDS:.0f} s the server has "
                    "not acknowledged them: is it served with this table?"
                )
            self._sleep(0.005)

    def clear(self) -> None:
        """End the override."""
        self._table.clear_override()

    def _is_acknowledged(self, generation: int) -> bool:
        acknowledged = (OVERRIDE_CODE, generation)
        return any(
            (rank.acknowledged_source, rank.acknowledged_generation) == acknowledged
            for rank in self._table.worker_counters()[:1]
        )


def flush_cache(client: httpx2.Client) -> None:
    """Empty the server's prefix cache, so that no run profits from an earlier one."""
    response = client.post("/flush_cache", params={"timeout": 10})
    if response.status_code != 200:
        raise ServerRunError(f"the server did not flush its prefix cache: {response.text.strip()}")
