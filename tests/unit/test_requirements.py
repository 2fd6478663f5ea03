"""The pins of the environment: complete, explained, and not in each other's way."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

_REQUIREMENTS = Path(__file__).parents[2] / "requirements"


def _lines(name: str) -> Iterator[str]:
    for line in (_REQUIREMENTS / name).read_text().splitlines():
        if line and not line.startswith("#"):
            yield line


def _pins(name: str) -> dict[str, str]:
    """Return version by canonical name; a line that is not an exact pin fails here."""
    pins = {}
    for line in _lines(name):
        requirement = Requirement(line.partition(" #")[0])
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def _needs(name: str) -> Iterator[Requirement]:
    """Yield what an installed distribution requires on this machine, without its extras."""
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _unmet(name: str, pins: dict[str, str]) -> list[str]:
    return [
        f"{name} needs {requirement}"
        for requirement in _needs(name)
        if not requirement.specifier.contains(
            pins.get(canonicalize_name(requirement.name), "0"), prereleases=True
        )
    ]


def test_the_tools_repeat_no_pin_of_the_serving_environment() -> None:
    assert _pins("dev.txt").keys().isdisjoint(_pins("serving-cpu.txt"))


def test_every_tool_has_a_reason() -> None:
    without = [line for line in _lines("dev.txt") if len(line.partition("  # ")[2]) < 4]
    assert without == []


def test_installed_versions_are_the_pinned_ones() -> None:
    pins = _pins("serving-cpu.txt") | _pins("dev.txt")
    installed = {name: Version(importlib.metadata.version(name)).public for name in pins}
    assert installed == pins


def test_every_need_of_a_tool_is_pinned_too() -> None:
    """What `pip install --no-deps` would leave out, this names."""
    pins = _pins("serving-cpu.txt") | _pins("dev.txt")
    assert [problem for name in _pins("dev.txt") for problem in _unmet(name, pins)] == []


def test_the_environment_meets_the_dependencies_of_sglang_alloc() -> None:
    pins = _pins("serving-cpu.txt") | _pins("dev.txt")
    assert len(list(_needs("sglang-alloc"))) >= 5
    assert _unmet("sglang-alloc", pins) == []


def test_every_debian_package_has_a_reason() -> None:
    packages = list(_lines("debian.txt"))
    assert packages
    assert all("  # " in line for line in packages)
