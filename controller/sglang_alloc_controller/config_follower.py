"""Control story, beside every step: a changed configuration file takes effect, or is refused.

The file is looked at by one stat a tick. That follows the symbolic links by which Kubernetes swaps
a ConfigMap, works on network file systems, and needs neither a thread nor a watching library.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.errors import AllocError, ConfigurationError
from sglang_alloc_controller.settings import Settings, load_settings

# These hold files, ports and threads that live as long as the process.
RESTART_SECTIONS = ("table", "source", "http", "control", "kill_switch", "decision_log")
_Fingerprint = tuple[int, int, int, int] | None


class ReloadOutcome(NamedTuple):
    """What became of one reload."""

    applied: bool
    sentence: str


class ConfigFollower:
    """Watches one configuration file; the settings that were good last stay in force."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Begin with `settings`, which were just read from `path`."""
        self._path = path
        self._settings = settings
        self._taken = self._glimpsed = _fingerprint(path)
        # A plain flag: a signal handler may set it, and must take no lock.
        self._asked = False
        self._answered = threading.Condition()
        self._answers = 0
        self.last = ReloadOutcome(True, f"{path} as it was at the start.")

    def ask(self, timeout_seconds: float) -> ReloadOutcome:
        """Ask for a reload from another thread and wait for its outcome."""
        with self._answered:
            before = self._answers
            self._asked = True
            if self._answered.wait_for(lambda: self._answers > before, timeout_seconds):
                return self.last
        return ReloadOutcome(False, f"No tick took the request within {timeout_seconds:g} s.")

    def ask_later(self) -> None:
        """Ask for a reload at the next tick; safe in a signal handler."""
        self._asked = True

    def follow(self, accept: Callable[[Settings], None]) -> tuple[ReloadOutcome, Settings] | None:
        """Return the outcome and the settings now in force, if there was a reload in this tick.

        A changed file counts when it has looked the same twice, so that none is read half written.
        `accept` raises an AllocError for settings that do not fit the table or the server.
        """
        if not self._asked and not self._is_settled_change():
            return None
        self._asked = False
        self._taken = self._glimpsed = _fingerprint(self._path)
        outcome = self._reload(accept)
        with self._answered:
            self.last = outcome
            self._answers += 1
            self._answered.notify_all()
        return outcome, self._settings

    def _is_settled_change(self) -> bool:
        seen, self._glimpsed = self._glimpsed, _fingerprint(self._path)
        return self._glimpsed != self._taken and self._glimpsed == seen

    def _reload(self, accept: Callable[[Settings], None]) -> ReloadOutcome:
        try:
            found = load_settings(self._path)
            _refuse_what_needs_a_restart(self._settings, found)
            accept(found)
        except AllocError as error:
            return ReloadOutcome(False, str(error))
        changed = _changed_sections(self._settings, found)
        self._settings = found
        told = ", ".join(changed) or "nothing"
        return ReloadOutcome(True, f"{self._path} was read again; {told} changed.")


def _changed_sections(before: Settings, after: Settings) -> list[str]:
    names = type(before).model_fields
    return [name for name in names if getattr(before, name) != getattr(after, name)]


def _refuse_what_needs_a_restart(before: Settings, after: Settings) -> None:
    fixed = [name for name in _changed_sections(before, after) if name in RESTART_SECTIONS]
    if fixed:
        raise ConfigurationError(
            f"{', '.join(fixed)} changed, which takes effect only in a new process. Restart the "
            "controller, or undo that change; nothing else of the file was taken either."
        )


def _fingerprint(path: Path) -> _Fingerprint:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
