"""Data story, step 0: which SGLang releases are supported, and whether each seam is as we rely on.

The same check runs in two places: in every SGLang process, on the live objects, before anything is
hooked; and in the tests, on the source of every supported release, without importing it.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import NamedTuple

from sglang_alloc.compatibility_seams import SEAMS, Seam

OLDEST_SGLANG = (0, 5, 16)
NEWEST_SGLANG = (0, 5, 23)
SUPPORTED_SGLANG = ">=0.5.16,<=0.5.23"

_FINAL_RELEASE = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:\.post(\d+))?(?:\+[\w.]+)?")


class Signature(NamedTuple):
    """What a caller can rely on: `leading` parameters by position, `keywords` by name."""

    leading: tuple[str, ...]
    keywords: frozenset[str]


# What was found at a seam's path: a function, the attributes of a class, or a constant's value.
Definition = Signature | frozenset[str] | str


def unsupported_version(version: str) -> list[str]:
    """Return the sentence that refuses this SGLang version, or an empty list.

    A local suffix (0.5.23+cu130) does not matter; a pre-release or a development build is refused,
    since its seams were not read.
    """
    match = _FINAL_RELEASE.fullmatch(version)
    if match:
        release = (int(match[1]), int(match[2]), int(match[3]))
        revision = int(match[4] or 0)
        if release >= OLDEST_SGLANG and (*release, revision) <= (*NEWEST_SGLANG, 0):
            return []
    return [
        f"SGLang {version} is outside the supported range {SUPPORTED_SGLANG}: install a release "
        "in that range, or a version of sglang-alloc that names yours"
    ]


@cache
def installed_version() -> str:
    """Return the version of the SGLang that is installed here."""
    return importlib.metadata.version("sglang")


@cache
def is_before(version: str, release: tuple[int, int, int]) -> bool:
    """Return whether a supported SGLang version is older than a release."""
    match = _FINAL_RELEASE.fullmatch(version)
    return match is not None and tuple(int(match[part]) for part in (1, 2, 3)) < release


def verify_seams(resolve: Callable[[str], object]) -> list[str]:
    """Return one sentence for each seam that is not as the plugin relies on; empty means all are.

    resolve: dotted path -> object, such as `pkgutil.resolve_name`; what it raises as ImportError
    or AttributeError counts as a missing seam.
    """
    problems = []
    for seam in SEAMS:
        try:
            definition = describe(resolve(seam.target))
        except (ImportError, AttributeError) as error:
            problems.append(f"{seam.target} is missing ({error}); it is needed to {seam.why}")
        else:
            problems += seam_problems(seam, definition)
    return problems


def seam_problems(seam: Seam, definition: Definition) -> list[str]:
    """Return what a definition found at the seam's path lacks, as sentences."""
    needs = _needs(seam)
    if isinstance(definition, str):
        lacking = [] if definition in needs.keywords else [f"the value {'/'.join(seam.needs)}"]
    elif isinstance(definition, Signature):
        lacking = _lacking_parameters(needs, definition)
    else:
        lacking = [name for name in seam.needs if definition.isdisjoint(name.split("|"))]
    return [
        f"{seam.target} lacks {name}, which is needed to {seam.why} (found: {_shown(definition)})"
        for name in lacking
    ]


def describe(found: object) -> Definition:
    """Describe a live object the way the seams are written down."""
    if isinstance(found, str):
        return found
    if inspect.isclass(found):
        return frozenset(dir(found)) | _declared_names(found)
    assert callable(found)
    parameters = inspect.signature(found).parameters.values()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return Signature(
        leading=tuple(p.name for p in parameters if p.kind in by_position),
        keywords=frozenset(p.name for p in parameters if p.kind in by_name),
    )


def _declared_names(cls: type) -> frozenset[str]:
    """Return what `dir` leaves out: methods of an enum, fields, and what methods set on self."""
    names: set[str] = set()
    for owner in cls.__mro__:
        names.update(vars(owner), vars(owner).get("__annotations__", {}))
        for member in vars(owner).values():
            function = inspect.unwrap(member) if callable(member) else member
            if isinstance(function, FunctionType):
                names.update(function.__code__.co_names)
    return frozenset(names)


def _needs(seam: Seam) -> Signature:
    """Read a seam's needs like a parameter list: those before "*" lead, the rest are by name."""
    star = seam.needs.index("*") if "*" in seam.needs else len(seam.needs)
    return Signature(leading=seam.needs[:star], keywords=frozenset(seam.needs) - {"*"})


def _lacking_parameters(needs: Signature, found: Signature) -> list[str]:
    in_place = found.leading[: len(needs.leading)]
    lacking = [
        f"the parameter {name!r} at position {position}"
        for position, name in enumerate(needs.leading)
        if in_place[position : position + 1] != (name,)
    ]
    by_name = sorted(needs.keywords - set(needs.leading) - found.keywords)
    return lacking + [f"the keyword {name!r}" for name in by_name]


def _shown(definition: Definition) -> str:
    if isinstance(definition, str):
        return repr(definition)
    if isinstance(definition, Signature):
        by_name = sorted(definition.keywords - set(definition.leading))
        return f"({', '.join([*definition.leading, *by_name])})"
    return f"a class with {len(definition)} names"
