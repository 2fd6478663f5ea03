"""Offline story: .npz files that are read whole or not at all."""

import io
import struct
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

_END_OF_DIRECTORY = b"PK\x05\x06"
_MEMBERS_AT = 10
_UNKNOWN = 0xFFFF  # the count stands elsewhere: the file has too many members to be one of ours


def parse_npz(content: bytes) -> dict[str, npt.NDArray[Any]]:
    """Return every array of an .npz file; pickles are refused.

    Raises:
        ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error: it is damaged, holds
            pickles, or is no .npz file.
    """
    # np.load leaves a damaged file open, so it gets bytes.
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array, saved by numpy.save instead of numpy.savez")
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
