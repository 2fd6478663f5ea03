"""Control story, by hand: who gives an order, as it stands in the shared table and in logs."""

import getpass
import os

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.shared_table_layout import OVERRIDE_ACTOR_BYTES


def user_name() -> str:
    """Return the name of the user of this process, or `uid N` where it has none.

    A container's user often has no entry in /etc/passwd.
    """
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid {os.getuid()}"


def checked_actor(actor: object) -> str:
    """Return `actor` with what cannot be printed replaced.

    Raises:
        ConfigurationError: it is no text of 1 to 64 bytes, which is what the shared table holds.
    """
    if not isinstance(actor, str):
        raise ConfigurationError(f"actor is {actor!r}; it must be a name.")
    name = "".join(character if character.isprintable() else "?" for character in actor)
    size = len(name.encode())
    if not 0 < size <= OVERRIDE_ACTOR_BYTES:
        raise ConfigurationError(
            f"The actor {name!r} has {size} bytes; give a name of 1 to {OVERRIDE_ACTOR_BYTES}."
        )
    return name
