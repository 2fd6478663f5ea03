"""Control story, last step: the one process that moves the budget writes the selector."""

import contextlib
import fcntl
import os
from pathlib import Path

from sglang_alloc import shared_table_layout as layout
from sglang_alloc.errors import SharedTableError, TableInUseError
from sglang_alloc.shared_table_reader import SharedTable
from sglang_alloc.shared_table_words import (
    RUNNING_ANY,
    CalmBudgets,
    next_generation,
    pack_calm_word,
    pack_word,
    unpack_word,
)

_LOCK_FILE_MODE = 0o660


class SelectorWriter:
    """The right to write the selector and the heartbeat of one table, held by one process.

    The right is an flock on `<path>.lock`, which the kernel takes back when the process dies by
    whatever means. The lock belongs to the path, so it also keeps writers of an earlier and a
    later publication apart. The lock file holds "pid epoch" for people.
    """

    def __init__(self, table: SharedTable) -> None:
        """Take the right; see `acquire`."""
        if not table.writable:
            raise SharedTableError(
                f"The selector of {table.path} was to be written, but the table was opened to "
                "look only. Open it with writable=True."
            )
        table.require_intact()
        self._table = table
        self._lock = _locked_file(lock_path(table.path))
        self._words = table.control_words()
        self.epoch = table.writer_epoch() + 1
        self._words[layout.WRITER_EPOCH_WORD] = self.epoch
        self._words[layout.WRITER_PID_WORD] = os.getpid()
        # Only people and the message to a second writer read it: a full file system may say no.
        with contextlib.suppress(OSError):
            os.truncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()} {self.epoch}\n".encode(), 0)

    @classmethod
    def acquire(cls, table: SharedTable) -> "SelectorWriter":
        """Become the writer of `table`; its budgets and generation stay until the first `write`.

        Raises:
            TableInUseError: a living process is the writer; the message names its pid.
            SharedTableError: the lock file cannot be made, or `table` was opened to look only.
        """
        return cls(table)

    def __enter__(self) -> "SelectorWriter":
        """Return itself; `with` closes it at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self.close()

    def write(
        self, prefill_budget: int, decode_budget: int, calm: CalmBudgets | None = None
    ) -> int:
        """Ask for these budgets (activations per token) and return the new generation.

        `calm` are the budgets of calm steps, None for the same ones.

        Raises:
            SharedTableError: a budget has no row, a calm one is below the other of its phase, its
                number of running requests is none, or the file is lost.
            TableInUseError: another writer took over, because the lock file was removed.
        """
        self._table.check_budget("prefill", prefill_budget)
        self._table.check_budget("decode", decode_budget)
        if calm is not None:
            self._check_calm("prefill", calm.prefill_budget, prefill_budget)
            self._check_calm("decode", calm.decode_budget, decode_budget)
            self._check_running(calm.running_requests)
        self._require_own_table()
        selector = unpack_word(self._words[layout.SELECTOR_WORD])
        generation = next_generation(selector.generation)
        # Before the selector: a reader that sees the new budgets is to find the calm ones there.
        self._words[layout.CALM_WORD] = 0 if calm is None else pack_calm_word(generation, calm)
        self._words[layout.SELECTOR_WORD] = pack_word(generation, prefill_budget, decode_budget)
        return generation

    def beat(self, now_ns: int) -> None:
        """Tell the workers that the writer lives at `now_ns` (monotonic).

        Raises:
            SharedTableError: the file is lost.
            TableInUseError: another writer took over, because the lock file was removed.
        """
        self._require_own_table()
        self._words[layout.HEARTBEAT_WORD] = now_ns

    def close(self) -> None:
        """Give the right back; the budgets stay, and go stale without a heartbeat."""
        if self._lock >= 0:
            self._words.release()
            os.close(self._lock)
            self._lock = -1

    def _check_calm(self, phase: str, calm_budget: int, budget: int) -> None:
        self._table.check_budget(f"calm {phase}", calm_budget)
        if calm_budget < budget:
            raise SharedTableError(
                f"A calm {phase} budget of {calm_budget} activations per token was asked of "
                f"{self._table.path} beside a {phase} budget of {budget}. Calm steps may not have "
                "the smaller budget: choose at least the other one."
            )

    def _check_running(self, running_requests: int) -> None:
        if not 1 <= running_requests <= RUNNING_ANY:
            raise SharedTableError(
                f"Calm budgets for fewer than {running_requests} running requests were asked of "
                f"{self._table.path}. Choose 1 to {RUNNING_ANY}, which stands for any number."
            )

    def _require_own_table(self) -> None:
        self._table.require_intact()
        found = self._words[layout.WRITER_EPOCH_WORD]
        if found != self.epoch:
            raise TableInUseError(
                f"This process (pid {os.getpid()}) wrote the selector of {self._table.path} as "
                f"writer {self.epoch}, but writer {found} (pid {self._table.writer_pid()}) has "
                "taken over. Stop one of the two; do not remove the lock file."
            )


def lock_path(path: Path) -> Path:
    """Return the path of the lock file of the table at `path`."""
    return path.with_name(path.name + ".lock")


def _locked_file(path: Path) -> int:
    """Return a locked descriptor of the file that `path` names now, not of one since removed."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _LOCK_FILE_MODE)
        except OSError as error:
            raise SharedTableError(
                f"Cannot open the lock file {path} for the one writer: {error.strerror} (uid "
                f"{os.geteuid()}). Run as a user who may write there."
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").split()
            os.close(descriptor)
            raise TableInUseError(
                f"This process (pid {os.getpid()}) wants to write the selector that {path} "
                f"guards, but pid {holder[0] if holder else 'unknown'} already does. Stop that "
                "controller first; one table has one writer."
            ) from error
        if _is_named(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)
