"""Data story: the door that SGLang knocks on in each of its processes. Standard library only.

SGLang logs what a plugin raises and serves on, which here would mean without the budget that was
asked for. So once a table is configured, anything that goes wrong, a failed import included, ends
the process: `SystemExit` passes SGLang's handler.
"""

from __future__ import annotations

import logging
import os

TABLE_VARIABLE = "SGLANG_ALLOC_TABLE"


def register() -> None:
    """Do nothing when no table is configured; else put the hooks in place, or end the process."""
    if not os.environ.get(TABLE_VARIABLE, "").strip():
        return
    try:
        from sglang_alloc.plugin import register_hooks

        register_hooks()
    except Exception as error:
        logging.getLogger("sglang_alloc").debug("the plugin could not start", exc_info=True)
        raise SystemExit(f"sglang-alloc refuses to serve: {error}") from error
