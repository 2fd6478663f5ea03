"""Pack what a GPU machine without a network needs to run the benches and the kernels' tests.

    python kernels/bench/offline_bundle.py --have freeze.txt --part-size 90M --out out/bundle

`--have` is what `pip freeze` prints on that machine; what is in it in the version needed is not
brought again. Run this where pip can download, with the Python version of that machine: markers in
requirements are judged by the running Python. `--dry-run` says what would be packed, and stops.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomllib

from offline.parts import checksums, parse_size, split_file
from offline.selection import (
    NEVER,
    Choice,
    choose,
    normalised,
    platform_tags,
    present_versions,
    resolved_wheels,
)
from offline.slim_wheel import slim_wheel
from offline.texts import INSTALL, OUTER_README, README, RUN

ROOT = Path(__file__).parents[2]
SOURCE = ("kernels", "controller", "sglang_alloc", "tests", "Makefile", "pyproject.toml")
TESTING = ("pytest", "hypothesis")
KERNELS = "sglang-kernel"
TOOLKIT = "cuda-toolkit[nvcc,crt,nvvm,cccl]"  # torch says in which version


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the bundle; return 0 when its parts are written, or the dry run has been shown."""
    given = _parse(arguments)
    try:
        report = _report(given)
        never = NEVER | dict.fromkeys(given.leave, "asked to leave it out")
        present = present_versions(_lines(given.have))
        choices = choose(resolved_wheels(report), present, never, given.bring)
        print(_shown(choices))
        if not given.dry_run:
            _pack(given, choices)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"offline_bundle: {_told(error)}", file=sys.stderr)
        return 1
    return 0


def _report(given: argparse.Namespace) -> dict[str, Any]:
    """Return pip's report of what it would install for that machine, or the one given."""
    if given.report is not None:
        return dict(json.loads(given.report.read_text(encoding="utf-8")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    engine = (f"sglang=={given.sglang}", f"{KERNELS}=={given.kernel}")
    wanted = (*engine, *TESTING, TOOLKIT, *project["dependencies"])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "report.json"
        target = ("--target", scratch, "--ignore-installed")
        _pip("install", "--dry-run", "--report", str(path), *target, *_platform(given), *wanted)
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _pack(given: argparse.Namespace, choices: Sequence[Choice]) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.out) as scratch:
        bundle = Path(scratch) / "bundle"
        wheels = bundle / "wheels"
        wheels.mkdir(parents=True)
        brought = [choice.wheel for choice in choices if choice.is_brought]
        pinned = [f"{wheel.name}=={wheel.version}" for wheel in brought]
        _pip("download", "--no-deps", "--dest", str(wheels), *_platform(given), *pinned)
        for wheel in sorted(wheels.glob("*.whl")):
            if normalised(wheel.name.partition("-")[0]) == KERNELS:
                slim = slim_wheel(wheel, Path(scratch), given.architecture)
                shutil.move(slim, wheel)
        _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
        _write_texts(bundle, given, choices)
        _copy_source(bundle / "source")
        archive = given.out / "bundle.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(bundle, "bundle")
    parts = split_file(archive, given.part_size)
    (given.out / "SHA256SUMS").write_text(checksums(parts), encoding="utf-8")
    (given.out / "README").write_text(OUTER_README, encoding="utf-8")
    print(f"{len(parts)} parts in {given.out}; {given.out / 'README'} tells how to use them")


def _write_texts(bundle: Path, given: argparse.Namespace, choices: Sequence[Choice]) -> None:
    left_out = [choice for choice in choices if not choice.is_brought]
    lines = [f"- {c.wheel.name} {c.wheel.version}: {c.reason}" for c in left_out]
    facts = {
        "python": given.python,
        "sglang": given.sglang,
        "architecture": given.architecture,
        "commit": _commit(),
        "left_out": "\n".join(lines) or "Nothing.",
    }
    (bundle / "README.md").write_text(README.format(**facts), encoding="utf-8")
    for name, text in (("install.sh", INSTALL), ("run.sh", RUN)):
        (bundle / name).write_text(text, encoding="utf-8")
        (bundle / name).chmod(0o755)


def _copy_source(folder: Path) -> None:
    """Copy what the benches and the kernels' tests run from."""
    skipped = shutil.ignore_patterns("__pycache__", "*.safetensors", "recorded", "results")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skipped)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "COMMIT").write_text(f"{_commit()}\n", encoding="utf-8")


def _shown(choices: Sequence[Choice]) -> str:
    """Return one line per wheel, those that are brought first."""
    ordered = sorted(choices, key=lambda choice: (not choice.is_brought, choice.wheel.name))
    lines = [
        f"{'bring' if c.is_brought else 'leave'}  {c.wheel.name} {c.wheel.version}: {c.reason}"
        for c in ordered
    ]
    return "\n".join(lines)


def _platform(given: argparse.Namespace) -> list[str]:
    version = given.python.replace(".", "")
    platforms = [option for tag in platform_tags(given.glibc) for option in ("--platform", tag)]
    return [
        "--only-binary=:all:",
        "--python-version",
        version,
        "--implementation",
        "cp",
        *platforms,
    ]


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def _lines(path: Path | None) -> list[str]:
    return [] if path is None else path.read_text(encoding="utf-8").splitlines()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "-"


def _told(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        command = " ".join(str(word) for word in error.cmd[:6])
        return f"`{command} ...` failed with status {error.returncode}; its message is above"
    return str(error)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="3.12", help="Python of the GPU machine (3.12)")
    parser.add_argument("--sglang", default="0.5.16", help="release of SGLang (0.5.16)")
    parser.add_argument("--kernel", default="0.4.5", help=f"release of {KERNELS} (0.4.5)")
    parser.add_argument("--architecture", default="sm90", help="GPU architecture (sm90: Hopper)")
    parser.add_argument("--glibc", default="2.35", help="glibc of that machine (2.35)")
    parser.add_argument("--have", type=Path, help="what `pip freeze` printed on that machine")
    parser.add_argument("--bring", nargs="+", default=[], help="bring these, if they are not there")
    parser.add_argument("--leave", nargs="+", default=[], help="leave these out (patterns)")
    parser.add_argument("--part-size", type=parse_size, default=parse_size("90M"))
    parser.add_argument("--out", type=Path, default=Path("out/bundle"))
    parser.add_argument("--dry-run", action="store_true", help="only say what would be packed")
    parser.add_argument("--report", type=Path, help="use this report of `pip install --report`")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
