"""The bundle for a machine without a network: what it brings, slims and splits."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import offline_bundle
from moe_bench import facts
from offline.parts import checksums, parse_size, split_file
from offline.selection import (
    Choice,
    Wheel,
    choose,
    platform_tags,
    present_versions,
    resolved_wheels,
)
from offline.slim_wheel import slim_wheel
from sglang_alloc.server_runs.machine import source_commit

RESOLVED = {
    "sglang": "0.5.16",
    "sglang_kernel": "0.4.5",
    "torch": "2.11.0",
    "nvidia-nccl-cu13": "2.28.9",
    "nvidia-ml-py": "13.615.71",
    "nvidia-cuda-nvcc": "13.0.88",
    "flashinfer-python": "0.6.14",
    "numpy": "2.3.1",
    "PyYAML": "6.0.2",
}


def _report() -> dict[str, object]:
    items = [
        {
            "metadata": {"name": name, "version": version},
            "download_info": {"url": f"https://host/{name}-{version}-py3-none-any.whl"},
        }
        for name, version in RESOLVED.items()
    ]
    return {"version": "1", "install": items}


def _choices(*freeze: str, always: tuple[str, ...] = ()) -> dict[str, Choice]:
    chosen = choose(resolved_wheels(_report()), present_versions(freeze), always=always)
    return {choice.wheel.name: choice for choice in chosen}


def test_what_the_machine_has_in_the_needed_version_is_left_out() -> None:
    found = _choices("numpy==2.3.1", "pyyaml==5.4", "# a comment", "-e git+https://x#egg=y")
    assert not found["numpy"].is_brought
    assert found["pyyaml"].is_brought
    assert found["pyyaml"].reason == "5.4 is there, 6.0.2 is needed"
    assert found["sglang"].is_brought
    assert found["sglang"].reason == "is not there"


def test_torch_and_its_libraries_are_never_brought_unless_asked_for() -> None:
    found = _choices()
    for name in ("torch", "nvidia-nccl-cu13"):
        assert not found[name].is_brought
    assert _choices(always=("Nvidia_NCCL.cu13",))["nvidia-nccl-cu13"].is_brought


def test_what_sglang_imports_and_compiles_with_is_brought() -> None:
    """Its sampler imports FlashInfer on every GPU, whatever the backend; its kernels need nvcc."""
    found = _choices()
    for name in ("nvidia-ml-py", "flashinfer-python", "nvidia-cuda-nvcc"):
        assert found[name].is_brought
    assert not _choices("nvidia-cuda-nvcc==13.0.88")["nvidia-cuda-nvcc"].is_brought


def test_a_local_version_or_a_path_counts_as_the_same() -> None:
    freeze = ("numpy==2.3.1+cu130", "sglang @ file:///opt/sglang.whl")
    found = _choices(*freeze)
    assert not found["numpy"].is_brought
    assert not found["sglang"].is_brought


def test_every_older_tag_is_named_because_pip_takes_each_alone() -> None:
    tags = platform_tags("2.28")
    assert tags[0] == "manylinux_2_28_x86_64"
    assert "manylinux_2_17_x86_64" in tags
    assert "manylinux_2_31_x86_64" not in tags
    assert tags[-1] == "manylinux1_x86_64"
    with pytest.raises(ValueError, match="ldd --version"):
        platform_tags("2")


def _make_wheel(folder: Path) -> Path:
    path = folder / "sglang_kernel-0.4.5-cp310-abi3-manylinux2014_x86_64.whl"
    files = {
        "sgl_kernel/__init__.py": "import ctypes\n",
        "sgl_kernel/sm90/common_ops.abi3.so": "for hopper",
        "sgl_kernel/sm100/common_ops.abi3.so": "for blackwell",
        "sgl_kernel/flash_ops.abi3.so": "for every GPU, and large",
        "sglang_kernel-0.4.5.dist-info/METADATA": "Name: sglang-kernel\n",
        "sglang_kernel-0.4.5.dist-info/RECORD": "old\n",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def test_a_slim_wheel_holds_one_architecture_and_a_true_record(tmp_path: Path) -> None:
    (tmp_path / "slim").mkdir()
    slim = slim_wheel(_make_wheel(tmp_path), tmp_path / "slim", "sm90")
    with zipfile.ZipFile(slim) as wheel:
        assert set(wheel.namelist()) == {
            "sgl_kernel/__init__.py",
            "sgl_kernel/sm90/common_ops.abi3.so",
            "sglang_kernel-0.4.5.dist-info/METADATA",
            "sglang_kernel-0.4.5.dist-info/RECORD",
        }
        record = wheel.read("sglang_kernel-0.4.5.dist-info/RECORD").decode()
        rows = list(csv.reader(io.StringIO(record)))
        assert {row[0] for row in rows} == set(wheel.namelist())
        for name, digest, size in rows:
            if not name.endswith("RECORD"):
                content = wheel.read(name)
                expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
                assert digest == "sha256=" + expected.decode().rstrip("=")
                assert int(size) == len(content)


def test_a_wheel_without_the_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing for sm75.*sm100, sm90"):
        slim_wheel(_make_wheel(tmp_path), tmp_path, "sm75")


@pytest.mark.parametrize(
    ("size", "sizes"), [(1000, [1000]), (1001, [1000, 1]), (2000, [1000, 1000])]
)
def test_parts_are_below_the_limit_and_join_to_the_file(
    size: int, sizes: list[int], tmp_path: Path
) -> None:
    content = bytes(i % 251 for i in range(size))
    source = tmp_path / "bundle.tar"
    source.write_bytes(content)
    parts = split_file(source, 1000)
    assert [part.stat().st_size for part in parts] == sizes
    assert b"".join(part.read_bytes() for part in sorted(tmp_path.glob("*.part*"))) == content
    assert not source.exists()
    (tmp_path / "SUMS").write_text(checksums(parts))
    subprocess.run(["sha256sum", "--quiet", "-c", "SUMS"], cwd=tmp_path, check=True)


def test_sizes_have_units() -> None:
    assert parse_size("90M") == 90_000_000
    assert parse_size("1.5G") == 1_500_000_000
    assert parse_size("512Ki") == 512 * 1024
    with pytest.raises(ValueError, match="is not a size"):
        parse_size("large")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(_report()))
    return path


def test_a_dry_run_says_what_would_be_packed_and_packs_nothing(
    report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("numpy==2.3.1\n")
    out = tmp_path / "out"
    given = ["--report", str(report), "--have", str(freeze), "--out", str(out), "--dry-run"]
    assert offline_bundle.main(given) == 0
    said = capsys.readouterr().out.splitlines()
    assert "bring  sglang-kernel 0.4.5: is not there" in said
    assert "leave  numpy 2.3.1: is there" in said
    assert not out.exists()


def test_a_bundle_holds_wheels_source_and_how_to_use_them(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> None:
        asked.append(arguments)
        folder = Path(arguments[arguments.index("--dest") + 1 if "--dest" in arguments else 3])
        if arguments[0] == "download":
            _make_wheel(folder)
        else:
            (folder / "sglang_alloc-0-py3-none-any.whl").touch()

    monkeypatch.setattr(offline_bundle, "_pip", pip)
    out = tmp_path / "out"
    given = ["--report", str(report), "--out", str(out), "--part-size", "500K"]
    assert offline_bundle.main([*given, "--leave", "pyyaml"]) == 0
    download = asked[0]
    assert {"sglang==0.5.16", "numpy==2.3.1", "nvidia-ml-py==13.615.71"} <= set(download)
    assert not {"torch==2.11.0", "pyyaml==6.0.2"} & set(download)
    parts = sorted(out.glob("bundle.tar.part*"))
    assert len(parts) > 1
    assert max(part.stat().st_size for part in parts) <= 500_000
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=out, check=True)
    content = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(fileobj=content) as tar:
        names = set(tar.getnames())
        for name in ("install.sh", "run.sh"):
            member = tar.getmember(f"bundle/{name}")
            assert member.mode & 0o111
            script = tar.extractfile(member)
            assert script is not None
            subprocess.run(["bash", "-n"], input=script.read(), check=True)
        readme = tar.extractfile("bundle/README.md")
        assert readme is not None
        assert "- torch 2.11.0: has to be there" in readme.read().decode()
        noted = tar.extractfile(f"bundle/source/{facts.COMMIT.name}")
        assert noted is not None
        assert noted.read().decode().strip() == source_commit().rstrip("+")
    assert "bundle/wheels/sglang_alloc-0-py3-none-any.whl" in names
    assert "bundle/source/kernels/bench/moe_bench/__main__.py" in names
    assert "bundle/source/tests/kernels/test_device_enforcement.py" in names
    assert not [name for name in names if name.endswith(".safetensors") or "__pycache__" in name]


def test_rows_measured_in_a_bundle_name_the_commit_that_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert facts.commit() == source_commit()
    (tmp_path / "COMMIT").write_text("0123456789ab\n")
    monkeypatch.setattr(facts, "COMMIT", tmp_path / "COMMIT")
    assert facts.commit() == "0123456789ab"


def test_a_broken_report_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.json"
    assert offline_bundle.main(["--report", str(missing), "--dry-run"]) == 1
    assert "none.json" in capsys.readouterr().err


def test_a_wheel_is_named_by_its_url() -> None:
    assert resolved_wheels(_report())[1] == Wheel(
        "sglang-kernel", "0.4.5", "https://host/sglang_kernel-0.4.5-py3-none-any.whl"
    )
