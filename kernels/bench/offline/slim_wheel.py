"""Bundle, step 2: a kernel wheel without the binaries of other GPU architectures."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path, PurePosixPath

BINARIES = (".so", ".a", ".cubin", ".fatbin")


def is_kept(path: str, architecture: str) -> bool:
    """Return whether a file of the wheel stays.

    A binary stays if it lies in the folder of the architecture (`sm90/common_ops.abi3.so`); files
    that are no binaries always do.
    """
    parts = PurePosixPath(path).parts
    is_binary = any(suffix in BINARIES for suffix in PurePosixPath(path).suffixes)
    return not is_binary or architecture in parts


def slim_wheel(source: Path, folder: Path, architecture: str) -> Path:
    """Write the wheel again under its own name into `folder`, with a RECORD that is true.

    Raises ValueError when the wheel has no binary for the architecture: then nothing would run.
    """
    target = folder / source.name
    rows: list[str] = []
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        names = [name for name in old.namelist() if not name.endswith("/")]
        kept = [name for name in names if is_kept(name, architecture)]
        if not any(architecture in PurePosixPath(name).parts for name in kept):
            found = sorted({part for name in names for part in PurePosixPath(name).parts[:-1]})
            raise ValueError(
                f"{source.name} holds nothing for {architecture}; its folders are "
                f"{', '.join(found)}. Name one of them with --architecture."
            )
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        for name in kept:
            if name != record:
                content = old.read(name)
                new.writestr(old.getinfo(name), content)
                rows.append(f"{name},sha256={_digest(content)},{len(content)}")
        new.writestr(record, "\n".join([*rows, f"{record},,", ""]))
    return target


def _digest(content: bytes) -> str:
    digest = hashlib.sha256(content).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
