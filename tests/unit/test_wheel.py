"""What `pip install` puts into a user's environment, read from a wheel that is built here."""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(_REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def _metadata_file(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_installing_never_touches_torch_triton_or_sglang(wheel: zipfile.ZipFile) -> None:
    lines = Parser().parsestr(_metadata_file(wheel, "METADATA")).get_all("Requires-Dist")
    assert lines is not None
    required = {Requirement(line).name.lower() for line in lines}
    assert required.isdisjoint({"torch", "torchvision", "triton", "sglang", "transformers"})
    assert {"numpy", "typer", "pydantic"} <= required


def test_the_three_packages_are_all_that_is_installed(wheel: zipfile.ZipFile) -> None:
    roots = {path.split("/")[0] for path in wheel.namelist()}
    packages = {root for root in roots if not root.endswith(".dist-info")}
    assert packages == {"sglang_alloc", "sglang_alloc_kernels", "sglang_alloc_controller"}


def test_the_wheel_is_typed_and_carries_no_weights_or_tests(wheel: zipfile.ZipFile) -> None:
    paths = wheel.namelist()
    assert {f"{package}/py.typed" for package in ("sglang_alloc", "sglang_alloc_kernels")} <= set(
        paths
    )
    assert not [path for path in paths if path.endswith(".safetensors") or "test_" in path]


def test_sglang_finds_the_plugin_and_users_find_the_commands(wheel: zipfile.ZipFile) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read_string(_metadata_file(wheel, "entry_points.txt"))
    assert dict(entry_points["sglang.srt.plugins"]) == {
        "sglang_alloc": "sglang_alloc.plugin_entry:register"
    }
    assert set(entry_points["console_scripts"]) == {"sglang-alloc", "sglang-alloc-controller"}


def test_every_entry_point_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read_string(_metadata_file(wheel, "entry_points.txt"))
    for section in entry_points.sections():
        for target in entry_points[section].values():
            module, _, function = target.partition(":")
            source = wheel.read(f"{module.replace('.', '/')}.py").decode()
            assert f"def {function}(" in source, target
