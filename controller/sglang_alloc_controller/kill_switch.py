"""Control story, before the law: a person's switch that ends all trading of quality, at once.

It is on while the file is there or while the environment says so. An order by HTTP writes the file;
only where that fails does this process remember the order itself.
"""

import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from sglang_alloc.errors import AllocError

KILL_VARIABLE = "SGLANG_ALLOC_KILL_SWITCH"
_OFF_WORDS = frozenset({"", "0", "false", "no", "off"})


class KillSwitchError(AllocError):
    """The switch cannot be released from here."""


class KillSwitch:
    """The switch of one controller; any thread may ask, engage or release."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        """Take the file to look for and the environment, which is read once."""
        self.path = path
        self._by_environment = environment.get(KILL_VARIABLE, "").lower() not in _OFF_WORDS
        self._by_request = ""

    def cause(self) -> str | None:
        """Return what holds the switch on, or None while it is off. Costs one stat.

        A file that cannot be looked for counts as there: full quality is the safe side.
        """
        if self._by_environment:
            return f"environment {KILL_VARIABLE}"
        if self._by_request:
            return f"http {self._by_request}"
        try:
            os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return f"file {self.path}: {error.strerror}"
        return f"file {self.path}"

    def engage(self, actor: str) -> None:
        """Switch on by the file, which outlives this process and ends the switch when removed.

        Raises:
            KillSwitchError: the file cannot be written; the switch is on in memory alone.
        """
        self._by_request = actor
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({"actor": actor, "time": now}) + "\n"
        try:
            self.path.write_text(line, encoding="utf-8")
        except OSError as error:
            if os.path.lexists(self.path):
                # On a full disk it is empty: on all the same, only without the actor's name.
                self._by_request = ""
                return
            raise KillSwitchError(
                f"The kill switch is on until this controller stops, but {self.path} cannot be "
                f"written ({error.strerror}), so the next one would not know. Set "
                "kill_switch.path to a file in a folder that this user may write to."
            ) from error
        self._by_request = ""

    def release(self) -> None:
        """Switch off what the file and HTTP had switched on.

        Raises:
            KillSwitchError: the environment holds it on, or the file cannot be removed.
        """
        if self._by_environment:
            raise KillSwitchError(
                f"{KILL_VARIABLE} is set in this controller's environment. Unset it and start the "
                "controller again."
            )
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise KillSwitchError(
                f"Cannot remove {self.path}: {error.strerror}. Remove it by hand."
            ) from error
        self._by_request = ""
