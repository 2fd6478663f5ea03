"""The check before anything in SGLang is patched: versions, and the shape of the seams."""

from __future__ import annotations

import ast
import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_alloc import plugin
from sglang_alloc.compatibility import (
    SUPPORTED_SGLANG,
    Signature,
    describe,
    seam_problems,
    unsupported_version,
    verify_seams,
)
from sglang_alloc.compatibility_seams import SEAMS, Seam

_FUNCTION = Seam("pkg.route", "function", ("states", "config", "*", "layer"), "drop slots")


@pytest.mark.parametrize(
    "version", ["0.5.16", "0.5.16.post1", "0.5.19", "0.5.22.post3", "0.5.23", "0.5.23+cu130"]
)
def test_every_release_in_the_range_is_supported(version: str) -> None:
    assert unsupported_version(version) == []


@pytest.mark.parametrize(
    "version",
    ["0.5.15", "0.5.15.post1", "0.4.23", "0.5.23.post1", "0.5.24", "0.6.16", "1.5.20"],
)
def test_a_release_outside_the_range_is_refused_with_the_range(version: str) -> None:
    (problem,) = unsupported_version(version)
    assert version in problem
    assert SUPPORTED_SGLANG in problem


@pytest.mark.parametrize("version", ["0.5.20rc1", "0.5.21.dev8+g1a2b3c", "0.5", "unknown", ""])
def test_a_version_whose_seams_were_not_read_is_refused(version: str) -> None:
    assert len(unsupported_version(version)) == 1


def test_a_function_with_all_parameters_in_place_has_no_problem() -> None:
    def route(states: object, config: object, extra: int = 0, *, layer: int) -> None: ...

    assert seam_problems(_FUNCTION, describe(route)) == []


def test_a_parameter_that_moved_is_named_with_its_position() -> None:
    def route(config: object, states: object, *, layer: int) -> None: ...

    problems = seam_problems(_FUNCTION, describe(route))
    assert len(problems) == 2
    assert "'states' at position 0" in problems[0]
    assert "drop slots" in problems[0]


def test_a_keyword_that_is_gone_is_named() -> None:
    def route(states: object, config: object, **rest: object) -> None: ...

    (problem,) = seam_problems(_FUNCTION, describe(route))
    assert "the keyword 'layer'" in problem
    assert "(states, config)" in problem


def test_a_hooked_function_is_described_as_the_original() -> None:
    def route(states: object, config: object, *, layer: int) -> None: ...

    @functools.wraps(route)
    def hooked(*args: object, **kwargs: object) -> None: ...

    assert describe(hooked) == Signature(
        leading=("states", "config"), keywords=frozenset({"states", "config", "layer"})
    )


def test_either_name_of_a_renamed_field_will_do() -> None:
    @dataclass
    class Before:
        num_fused: int

    class After:
        @property
        def num_shared(self) -> int:
            return 0

    seam = Seam("pkg.Config", "class", ("num_fused|num_shared",), "keep the shared experts")
    assert seam_problems(seam, describe(Before)) == []
    assert seam_problems(seam, describe(After)) == []
    (problem,) = seam_problems(seam, describe(SimpleNamespace))
    assert "num_fused|num_shared" in problem


def test_methods_of_an_enum_and_attributes_set_on_self_are_seen() -> None:
    class Mode(enum.IntEnum):
        DECODE = 1

        def is_decode(self) -> bool:
            return self is Mode.DECODE

    class Runner:
        def load(self) -> None:
            self.model = object()

    assert {"DECODE", "is_decode"} <= set(describe(Mode))
    assert "model" in describe(Runner)


def test_a_constant_with_another_value_is_refused() -> None:
    seam = Seam("pkg.GROUP", "constant", ("pkg.plugins",), "be found")
    assert seam_problems(seam, "pkg.plugins") == []
    (problem,) = seam_problems(seam, "pkg.extensions")
    assert "'pkg.extensions'" in problem


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("no module pkg"), AttributeError("no attribute")]
)
def test_a_seam_that_does_not_resolve_is_one_sentence(error: Exception) -> None:
    problems = verify_seams(_raise(error))
    assert len(problems) == len(SEAMS)
    assert f"{SEAMS[0].target} is missing ({error})" in problems[0]


def test_every_path_that_the_plugin_hooks_is_a_verified_seam() -> None:
    hooked = {
        value
        for name, value in vars(plugin).items()
        if name.isupper() and isinstance(value, str) and value.startswith("sglang.")
    }
    assert len(hooked) >= 8
    assert hooked <= {seam.target for seam in SEAMS}


def test_everything_that_the_plugin_imports_from_sglang_is_a_verified_seam() -> None:
    files = sorted(Path(plugin.__file__).parent.glob("plugin*.py"))
    trees = [ast.parse(file.read_text()) for file in files]
    imported = {
        f"{node.module}.{name.name}"
        for node in chain.from_iterable(ast.walk(tree) for tree in trees)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang.")
        for name in node.names
    }
    assert len(imported) >= 5
    targets = [seam.target for seam in SEAMS]
    assert [path for path in imported if not any(t.startswith(path) for t in targets)] == []


def _raise(error: Exception) -> Callable[[str], object]:
    def resolve(target: str) -> object:
        raise error

    return resolve
