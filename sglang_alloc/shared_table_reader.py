"""Data story, first step: what budget is in force? Also home of the words that anyone may set."""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from os import SEEK_END, lseek
from pathlib import Path
from typing import Any

import numpy.typing as npt

from sglang_alloc import shared_table_layout as layout
from sglang_alloc.errors import SharedTableError
from sglang_alloc.shared_table_layout import (
    CALM_WORD,
    HEARTBEAT_WORD,
    MAPPED_BYTES,
    OVERRIDE_DEADLINE_WORD,
    PUBLICATION_WORD,
    SELECTOR_WORD,
)
from sglang_alloc.shared_table_open import map_words, open_checked, section_array
from sglang_alloc.shared_table_override import read_override, store_override
from sglang_alloc.shared_table_words import (
    CalmBudgets,
    CalmTokens,
    Fallback,
    Override,
    Selection,
    Selector,
    WorkerCounters,
    WorkerSlot,
    calm_of_word,
    unpack_word,
)

# Clocks of one machine agree: a heartbeat further ahead than this was left by another boot.
_FUTURE_TOLERANCE_NS = 1_000_000_000

# A setter holds its lock for some microseconds.
_LOCK_PATIENCE_SECONDS, _LOCK_LOOK_SECONDS = 0.5, 0.002

# Decoding a word costs ten times what reading it does, so the last one of each kind is kept.
# No word is -1, so these match none.
_NO_SELECTOR = (-1, Selector(0, 0, 0))
_NO_CONTROLLER = (-1, -1, Selection("controller", 0, 0, 0))
_NO_FALLBACK = (-1, Fallback("full"), Selection("fallback", 0, 0, 0))


class SharedTable:
    """An open shared table: constant sections, current budgets, and the words anyone may set.

    The payload is read once, checked against its SHA-256 and kept in private memory, so its arrays
    stay right whatever happens to the file later. Only pages 0 to 3 are mapped. Publishing again,
    which renames, leaves an open table as it is; `is_current` tells that it happened. A file that
    was shortened or overwritten in place is lost: `selection` then gives the fallback, and what
    has to write raises. The five cheapest reads (`selector_word` to `writer_pid`) do not look.
    """

    def __init__(self, path: Path, *, writable: bool = True) -> None:
        """Open `path`; see `open`."""
        descriptor, header, payload = open_checked(path, writable=writable)
        self._mapping = map_words(path, descriptor, writable=writable)
        self._bytes = memoryview(self._mapping)
        self._words = self._bytes.cast("Q")
        self._descriptor = descriptor
        self._setting = threading.Lock()
        self._header = header
        self._payload = payload
        self._publication_word = int.from_bytes(header.publication_id[:8], "little")
        self._last_selector = _NO_SELECTOR
        self._last_controller = _NO_CONTROLLER
        self._last_fallback = _NO_FALLBACK
        self.path = path
        self.writable = writable
        self.shape = header.shape
        self.fingerprint = header.fingerprint.hex()
        self.publication_id = header.publication_id.hex()
        self.payload_digest = header.payload_sha256.hex()
        self.model_id = header.model_id
        self.mode_note = header.mode_note
        self.published_ns = header.published_ns
        self.layer_ids = self.section("layer_ids")

    @classmethod
    def open(cls, path: Path, *, writable: bool = True) -> "SharedTable":
        """Open and check the table at `path`; pass `writable=False` to look only.

        Raises:
            SharedTableError: it is missing, foreign, of another version, truncated, corrupt, or
                not permitted to this user; the message says which and what to do.
        """
        return cls(path, writable=writable)

    def __enter__(self) -> "SharedTable":
        """Return itself; `with` closes it at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self.close()

    def section(self, name: str) -> npt.NDArray[Any]:
        """Return the read-only array `name` of the payload; it outlives `close`.

        Raises:
            SharedTableError: the table was published without it.
        """
        array = section_array(self._header, self._payload, name)
        if array is not None:
            return array
        raise SharedTableError(
            f"The shared table {self.path} has no section {name!r}, only "
            f"{', '.join(entry.name for entry in self._header.sections)}. Publish budget tables "
            "that hold it, or choose a mode that does not need it."
        )

    def has_section(self, name: str) -> bool:
        """Tell whether the table was published with the array `name`."""
        return any(entry.name == name for entry in self._header.sections)

    def selector_word(self) -> int:
        """Return the selector's u64: the cheapest way to see that nothing changed."""
        return self._words[SELECTOR_WORD]

    def selector(self) -> Selector:
        """Return the budgets that the controller asked for last."""
        word = self._words[SELECTOR_WORD]
        last_word, selector = self._last_selector
        if word != last_word:
            selector = unpack_word(word)
            self._last_selector = (word, selector)
        return selector

    def calm_budgets(self) -> CalmBudgets | None:
        """Return what the controller asked for last for calm steps.

        None where it asked for the same budgets in every step.
        """
        return self._calm_budgets(self.selector(), self._words[CALM_WORD])

    def heartbeat_ns(self) -> int:
        """Return the monotonic time of the controller's last beat, 0 when there was none."""
        return self._words[HEARTBEAT_WORD]

    def writer_epoch(self) -> int:
        """Return how many writers this publication has had."""
        return self._words[layout.WRITER_EPOCH_WORD]

    def writer_pid(self) -> int:
        """Return the last writer's pid in its own namespace, 0 when there was none."""
        return self._words[layout.WRITER_PID_WORD]

    def selection(self, now_ns: int, stale_after_ns: int, fallback: Fallback) -> Selection:
        """Decide the budgets for a step at `now_ns` (monotonic).

        An override in force comes first, then the selector while the heartbeat is at most
        `stale_after_ns` old, then `fallback`. A heartbeat that never was, or that lies over a
        second ahead, is stale; a selector that names no row counts as no controller, and so does
        a lost file.
        """
        if not self.is_intact():
            return self._fallen_back(max(self._last_controller[0], 0), fallback)
        words = self._words
        if words[OVERRIDE_DEADLINE_WORD] > now_ns:
            override = self._override(now_ns)
            if override is not None:
                return Selection("override", override.generation, *override[:2])
        word, calm_word = words[SELECTOR_WORD], words[CALM_WORD]
        heartbeat_ns = words[HEARTBEAT_WORD]
        if heartbeat_ns and -_FUTURE_TOLERANCE_NS <= now_ns - heartbeat_ns <= stale_after_ns:
            last_word, last_calm_word, selection = self._last_controller
            if word == last_word and calm_word == last_calm_word:
                return selection
            selector = unpack_word(word)
            if self._has_rows(*selector[1:]):
                calm = self._calm_budgets(selector, calm_word)
                selection = Selection("controller", *selector, calm)
                self._last_controller = (word, calm_word, selection)
                return selection
        return self._fallen_back(word, fallback)

    def override(self, now_ns: int) -> Override | None:
        """Return the override in force at `now_ns` (monotonic), if there is one.

        Raises:
            SharedTableError: the file is lost.
        """
        self.require_intact()
        return self._override(now_ns)

    def set_override(
        self, prefill_budget: int, decode_budget: int, deadline_ns: int, actor: str
    ) -> None:
        """Put a person's budgets in force until `deadline_ns` (monotonic), replacing any other.

        `actor` is cut to 64 bytes of UTF-8.

        Raises:
            SharedTableError: a budget has no row, the table was opened to look only, the file is
                lost, or another process was stopped while it set one.
        """
        self.check_budget("prefill", prefill_budget)
        self.check_budget("decode", decode_budget)
        with self._exclusive() as words:
            store_override(words, self._bytes, (prefill_budget, decode_budget), deadline_ns, actor)

    def clear_override(self) -> None:
        """End the override now; its generation is kept so that the next one is newer.

        Raises:
            SharedTableError: the table was opened to look only, the file is lost, or another
                process was stopped while it set one.
        """
        with self._exclusive() as words:
            words[OVERRIDE_DEADLINE_WORD] = 0

    def worker_slot(self, rank: int) -> WorkerSlot:
        """Return the slot that tensor-parallel rank `rank`, and nobody else, writes.

        Raises:
            SharedTableError: there is no slot for that rank, or the table was opened to look only.
        """
        self._require_writable()
        if not 0 <= rank < layout.MAX_WORKERS:
            raise SharedTableError(
                f"Rank {rank} asked for a worker slot of {self.path}, which has slots for ranks 0 "
                f"to {layout.MAX_WORKERS - 1}. Give each node a table of its own."
            )
        return WorkerSlot(self._slot_words(rank), self._calm_words(rank), self.is_intact)

    def worker_counters(self) -> list[WorkerCounters]:
        """Return the counters of every rank that has claimed its slot, by rank.

        Raises:
            SharedTableError: the file is lost.
        """
        self.require_intact()
        loaded = (WorkerCounters(*self._slot_words(rank)) for rank in range(layout.MAX_WORKERS))
        return [counters for counters in loaded if counters.pid]

    def calm_tokens(self) -> list[CalmTokens]:
        """Return how many tokens each of the 64 ranks served, zeros where it has not counted.

        Raises:
            SharedTableError: the file is lost.
        """
        self.require_intact()
        return [CalmTokens(*self._calm_words(rank)) for rank in range(layout.MAX_WORKERS)]

    def check_budget(self, phase: str, budget: int) -> None:
        """Raise `SharedTableError` unless the table has a row for `budget`."""
        if not self.shape.budget_min <= budget <= self.shape.budget_max:
            raise SharedTableError(
                f"A {phase} budget of {budget} activations per token was asked of {self.path}, "
                f"which has rows for {self.shape.budget_min} to {self.shape.budget_max}. Choose "
                "one in that range."
            )

    def is_current(self) -> bool:
        """Tell whether the path still holds this publication, intact."""
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        return os.path.samestat(os.fstat(self._descriptor), there) and self.is_intact()

    def is_intact(self) -> bool:
        """Tell whether the open file is still what was opened, not shortened or overwritten."""
        # A seek costs a third of a stat, and nothing else uses this descriptor's position.
        size = lseek(self._descriptor, 0, SEEK_END)
        return size >= MAPPED_BYTES and self._words[PUBLICATION_WORD] == self._publication_word

    def require_intact(self) -> None:
        """Raise `SharedTableError` if the file was shortened or overwritten in place."""
        if not self.is_intact():
            raise SharedTableError(
                f"The shared table {self.path} was shortened or overwritten in place after it was "
                "opened. Publish with `sglang-alloc publish`, never by copying over the file, and "
                "start what uses it again."
            )

    def close(self) -> None:
        """Unmap the words; arrays from `section` stay valid, worker slots do not."""
        if self._descriptor < 0:
            return
        self._words.release()
        self._bytes.release()
        # A worker slot that is still held keeps the mapping until it goes.
        with contextlib.suppress(BufferError):
            self._mapping.close()
        os.close(self._descriptor)
        self._descriptor = -1

    def control_words(self) -> memoryview:
        """Return the u64 words of pages 0 to 3, for the selector's one writer; release it."""
        return self._words[:]

    def _calm_budgets(self, selector: Selector, calm_word: int) -> CalmBudgets | None:
        """Return what a calm word says beside this selector, None where it says nothing."""
        calm = calm_of_word(calm_word, selector.generation)
        if calm is None:
            return None
        counts = (
            self._has_rows(calm.prefill_budget, calm.decode_budget)
            and calm.prefill_budget >= selector.prefill_budget
            and calm.decode_budget >= selector.decode_budget
        )
        return calm if counts else None

    def _override(self, now_ns: int) -> Override | None:
        override = read_override(self._words, self._bytes, now_ns)
        if override is None or not self._has_rows(override.prefill_budget, override.decode_budget):
            return None
        return override

    def _fallen_back(self, word: int, fallback: Fallback) -> Selection:
        last_word, last_fallback, selection = self._last_fallback
        if word == last_word and fallback is last_fallback:
            return selection
        generation, prefill_budget, decode_budget = unpack_word(word)
        if fallback.kind == "budget":
            prefill_budget, decode_budget = fallback.prefill_budget, fallback.decode_budget
        if fallback.kind == "full" or not self._has_rows(prefill_budget, decode_budget):
            prefill_budget = decode_budget = self.shape.budget_max
        selection = Selection("fallback", generation, prefill_budget, decode_budget)
        self._last_fallback = (word, fallback, selection)
        return selection

    def _has_rows(self, prefill_budget: int, decode_budget: int) -> bool:
        low, high = self.shape.budget_min, self.shape.budget_max
        return low <= prefill_budget <= high and low <= decode_budget <= high

    def _slot_words(self, rank: int) -> memoryview:
        start = layout.WORKER_SLOTS_WORD + rank * layout.WORKER_SLOT_WORDS
        return self._words[start : start + layout.WORKER_SLOT_WORDS]

    def _calm_words(self, rank: int) -> memoryview:
        start = layout.CALM_TOKENS_WORD + rank * layout.CALM_TOKENS_WORDS
        return self._words[start : start + layout.CALM_TOKENS_WORDS]

    def _require_writable(self) -> None:
        if not self.writable:
            raise SharedTableError(
                f"A word of {self.path} was to be changed, but the table was opened to look only. "
                "Open it with writable=True."
            )

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[memoryview]:
        self._require_writable()
        with self._setting:  # the lock on the file tells processes apart, not threads
            self._lock_others_out()
            try:
                self.require_intact()
                yield self._words
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _lock_others_out(self) -> None:
        """Take the lock of the setters; one that was stopped in the middle must not stop us."""
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise SharedTableError(
                        f"Another process has been setting the override of {self.path} for "
                        f"{_LOCK_PATIENCE_SECONDS:g} s, which takes microseconds: it was stopped "
                        "in the middle. End it; `lslocks` names it."
                    ) from error
                time.sleep(_LOCK_LOOK_SECONDS)
