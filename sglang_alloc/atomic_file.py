"""Replacing a file in one step, so that a reader sees the old content or the new, never a part.

Used by both contracts: the offline story's budget tables and the data story's shared table.
"""

import os
import tempfile
from pathlib import Path


def replace_file(path: Path, content: bytes, *, mode: int) -> None:
    """Write `content` beside `path`, flush it to storage and rename it over `path`.

    A process that has the previous file open or mapped keeps the previous content. Every byte is
    written, never left sparse, so a full file system fails here and not at a later page fault.
    A process killed in between leaves a hidden `.<name>.*.tmp` file and the previous content.

    Raises:
        OSError: the folder cannot be created or written, or the file system is full.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
