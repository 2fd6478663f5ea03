"""Where the server, the controller and the operator of one model meet when no path is given."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from sglang_alloc.errors import SharedTableError

SHARED_FOLDER = Path("/dev/shm/sglang-alloc")
TABLE_VARIABLE = "SGLANG_ALLOC_TABLE"


def default_shared_path(model_id: str, folder: Path = SHARED_FOLDER) -> Path:
    """Return the path of a model's shared table: its name with anything unusual made a dash."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model_id).strip("-.") or "model"
    return folder / f"{name}.tbl"


def require_folder(path: Path, default: Path = SHARED_FOLDER) -> None:
    """Refuse to publish at `path` where its folder is missing, unless that is the default one.

    Raises:
        SharedTableError: a folder made for a misspelt path would be one that nobody else looks in.
    """
    if path.parent == default or path.parent.is_dir():
        return
    raise SharedTableError(
        f"The shared table is to be published at {path}, and there is no folder {path.parent}. "
        f"Make the folder, correct the path, or leave --shared-path out for {default}."
    )


def find_shared_path(
    asked: Path | None,
    environment: Mapping[str, str] = os.environ,
    folder: Path = SHARED_FOLDER,
) -> Path:
    """Return the path asked for, else the environment's, else the only table in `folder`.

    Raises:
        SharedTableError: none was asked for and there are no tables, or several.
    """
    if asked is not None:
        return asked
    if environment.get(TABLE_VARIABLE):
        return Path(environment[TABLE_VARIABLE])
    found = sorted(folder.glob("*.tbl"))
    if len(found) == 1:
        return found[0]
    listed = ", ".join(str(path) for path in found) or "none"
    raise SharedTableError(
        f"No shared table was named, and {folder} holds {len(found)} ({listed}). Name one with "
        f"--shared-path or {TABLE_VARIABLE}, or publish one with `sglang-alloc publish`."
    )
