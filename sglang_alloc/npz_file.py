"""Offline story: .npz files that are read whole or not at all, and replaced in one step."""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang_alloc.atomic_file import replace_file
from sglang_alloc.errors import TableFormatError

_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # of a file with members, and of one without
_NPY_START = b"\x93NUMPY"
_END_OF_DIRECTORY = b"PK\x05\x06"
_MEMBERS_AT = 10
_UNKNOWN = 0xFFFF  # the count stands elsewhere: the file has too many members to be one of ours


def read_npz(path: Path, what: str) -> dict[str, npt.NDArray[Any]]:
    """Return every array of the .npz file at `path`; pickles are refused.

    `what` it should hold stands in the error's sentence: "budget tables".

    Raises:
        TableFormatError: the file is missing, damaged, or no .npz file.
    """
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError as error:
        raise TableFormatError(
            f"There are no {what} at {path}. Check the path, or make them first."
        ) from error
    except OSError as error:
        raise TableFormatError(
            f"Cannot read {what} from {path}: {error.strerror or error}."
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        # A flipped bit can mark a member as encrypted: RuntimeError.
        raise TableFormatError(
            f"{path} is not an intact .npz file of {what} ({error}). Copy it again from where it "
            "was made, or make it anew."
        ) from error


def write_npz(path: Path, fields: Mapping[str, Any], what: str) -> None:
    """Write arrays to `path` in one step: no half-written file ever has that name.

    Raises:
        TableFormatError: the folder cannot be written, or has no room.
    """
    content = io.BytesIO()
    np.savez_compressed(content, **fields)
    try:
        replace_file(path, content.getvalue(), mode=0o644)
    except OSError as error:
        raise TableFormatError(
            f"Cannot write {what} to {path}: {error.strerror}. Choose a folder that this user can "
            "write to and that has room."
        ) from error


def _parsed(content: bytes) -> dict[str, npt.NDArray[Any]]:
    if content.startswith(_NPY_START):
        raise ValueError("it is one array, of numpy.save; numpy.savez saves arrays with names")
    if not content.startswith(_ZIP_STARTS):
        raise zipfile.BadZipFile("it is no zip file")  # numpy would try it as a pickle
    # np.load leaves a damaged file open, so it gets bytes.
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        _require_all_members(content, len(archive.files))
        return {name: archive[name] for name in archive.files}


def _require_all_members(content: bytes, found: int) -> None:
    """Raise when the directory of members ends early, which zipfile takes for a shorter one.

    A flipped bit in the length of an entry makes the entries behind it a part of its comment.
    """
    end = content.rfind(_END_OF_DIRECTORY)
    (counted,) = struct.unpack_from("<H", content, end + _MEMBERS_AT)
    if counted not in (found, _UNKNOWN):
        raise zipfile.BadZipFile(f"{counted} members were written and {found} are found")
