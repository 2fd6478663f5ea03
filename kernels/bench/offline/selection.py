"""Bundle, step 1: which of the wheels that pip would install have to be brought."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any, NamedTuple

# Names, as patterns, that are never brought, with the reason.
NEVER: dict[str, str] = {
    "torch": "has to be there: it fits the machine's driver",
    "triton": "comes with torch",
    "nvidia-*": "come with torch, or are for kernels that are not used here",
    "cuda-*": "come with torch, or are for kernels that are not used here",
    "torchaudio": "not needed to serve text",
    "torchcodec": "not needed to serve text",
    "decord2": "not needed to serve text",
}

# The compiler, in torch's version of CUDA: SGLang compiles small kernels when they are first used.
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")
# What is needed although the patterns above name it; nvidia-ml-py tells SGLang the GPU's memory.
BROUGHT = ("nvidia-ml-py", *COMPILER)
OLDEST_GLIBC = 17


class Wheel(NamedTuple):
    """One distribution that pip resolved."""

    name: str  # normalised
    version: str
    url: str


class Choice(NamedTuple):
    """What becomes of a wheel: brought, or left out for a reason."""

    wheel: Wheel
    is_brought: bool
    reason: str


def normalised(name: str) -> str:
    """Return a distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def platform_tags(glibc: str, machine: str = "x86_64") -> list[str]:
    """Return the tags of wheels that a machine with this glibc runs, newest first.

    pip takes a tag given to it as that one alone, so all older ones have to be named.
    """
    match = re.fullmatch(r"2\.(\d+)", glibc.strip())
    if match is None or int(match[1]) < OLDEST_GLIBC:
        raise ValueError(
            f"{glibc!r} is not a glibc from 2.{OLDEST_GLIBC} on: `ldd --version` tells"
        )
    newer = [
        f"manylinux_2_{minor}_{machine}" for minor in range(int(match[1]), OLDEST_GLIBC - 1, -1)
    ]
    return [*newer, f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"manylinux1_{machine}"]


def resolved_wheels(report: Mapping[str, Any]) -> list[Wheel]:
    """Read pip's installation report (`pip install --dry-run --report`)."""
    return [
        Wheel(
            normalised(item["metadata"]["name"]),
            item["metadata"]["version"],
            item["download_info"]["url"],
        )
        for item in report["install"]
    ]


def present_versions(freeze: Iterable[str]) -> dict[str, str]:
    """Read what `pip freeze` printed on the GPU machine; a line without a version counts as any."""
    found = {}
    for line in freeze:
        text = line.partition("#")[0].strip()
        if text and not text.startswith("-"):
            name, _, version = re.sub(r"\s*(==| @ )\s*", "==", text, count=1).partition("==")
            found[normalised(name)] = version.strip()
    return found


def choose(
    wheels: Iterable[Wheel],
    present: Mapping[str, str],
    never: Mapping[str, str] = NEVER,
    always: Iterable[str] = (),
) -> list[Choice]:
    """Decide for each wheel, by name; one that is there in another version is brought.

    `always` names wheels to which `never` does not apply.
    """
    wanted = {normalised(name) for name in (*BROUGHT, *always)}
    return [_choice(wheel, present, never, wheel.name in wanted) for wheel in wheels]


def _choice(
    wheel: Wheel, present: Mapping[str, str], never: Mapping[str, str], is_wanted: bool
) -> Choice:
    for pattern, reason in never.items():
        if fnmatch(wheel.name, pattern) and not is_wanted:
            return Choice(wheel, False, reason)
    there = present.get(wheel.name)
    if there is not None and _same_version(there, wheel.version):
        return Choice(wheel, False, "is there")
    if there:
        return Choice(wheel, True, f"{there} is there, {wheel.version} is needed")
    return Choice(wheel, True, "is not there")


def _same_version(there: str, needed: str) -> bool:
    """Compare versions without their local part; a path instead of a version counts as the same."""
    if not there or "://" in there:
        return True
    return there.partition("+")[0] == needed.partition("+")[0]
