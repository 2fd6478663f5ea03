"""The source of every supported SGLang release, read out of the wheel that pip offers for it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from sglang_alloc.compatibility import NEWEST_SGLANG, OLDEST_SGLANG

RELEASES = tuple(
    f"{NEWEST_SGLANG[0]}.{NEWEST_SGLANG[1]}.{patch}"
    for patch in range(OLDEST_SGLANG[2], NEWEST_SGLANG[2] + 1)
)
_CACHE = Path(__file__).parents[2] / ".cache" / "sglang-wheels"


class ReleaseSource:
    """The Python files of one release, by the dotted names of their modules."""

    def __init__(self, version: str, wheel: Path) -> None:
        self.version = version
        self._archive = zipfile.ZipFile(wheel)
        self._paths = frozenset(self._archive.namelist())

    def module_text(self, dotted: str) -> str | None:
        """Return the source of a module, or None where the release has no such module."""
        stem = dotted.replace(".", "/")
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in self._paths:
                return self._archive.read(path).decode()
        return None

    def texts_under(self, dotted: str) -> list[str]:
        """Return the source of a module and of every module below it."""
        stem = dotted.replace(".", "/")
        paths = [path for path in sorted(self._paths) if path.startswith((f"{stem}.", f"{stem}/"))]
        return [self._archive.read(path).decode() for path in paths if path.endswith(".py")]

    def close(self) -> None:
        self._archive.close()


def open_release(version: str) -> ReleaseSource:
    """Open a release, downloading its wheel the first time (15 to 40 MB, kept in .cache)."""
    wheel = _cached_wheel(version)
    if wheel is None:
        _pip("download", "--quiet", "--no-deps", f"--dest={_CACHE}", f"sglang=={version}")
        wheel = _cached_wheel(version)
    assert wheel is not None, f"pip left no wheel of sglang {version} in {_CACHE}"
    return ReleaseSource(version, wheel)


def offered_releases() -> tuple[str, ...]:
    """Return every version of SGLang that pip offers, newest first."""
    listing = _pip("index", "versions", "sglang")
    line = next(line for line in listing.splitlines() if line.startswith("Available versions:"))
    return tuple(line.partition(":")[2].replace(" ", "").split(","))


def _cached_wheel(version: str) -> Path | None:
    return next(iter(sorted(_CACHE.glob(f"sglang-{version}-*.whl"))), None)


def _pip(*arguments: str) -> str:
    """Run pip for wheels only and return what it printed; its errors name what went wrong."""
    command = [sys.executable, "-m", "pip", *arguments, "--only-binary=:all:"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr}"
    return done.stdout
