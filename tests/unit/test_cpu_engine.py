"""The stand-ins that let SGLang's CPU engine run without compiled kernels (tests/cpu_engine)."""

from __future__ import annotations

import _ctypes
import importlib.metadata
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sgl_kernel
import torch
from cpu_torchvision_operators import OPERATORS, TorchvisionFinder, declare_missing_operators


def _run_python(code: str) -> str:
    """Run code in a fresh interpreter of this environment and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_each_request_gets_its_slice_of_the_cache_locations() -> None:
    table = torch.zeros(4, 6, dtype=torch.int32)
    sgl_kernel.assign_req_to_token_pool_cpu(
        torch.tensor([2, 0]),
        table,
        torch.tensor([1, 4]),
        torch.tensor([4, 5]),
        torch.tensor([11, 12, 13, 21]),
        6,
    )
    expected = torch.zeros(4, 6, dtype=torch.int32)
    expected[2, 1:4] = torch.tensor([11, 12, 13], dtype=torch.int32)
    expected[0, 4] = 21
    assert torch.equal(table, expected)


def test_a_request_without_new_tokens_writes_nothing() -> None:
    table = torch.zeros(2, 3, dtype=torch.int32)
    nothing, row = torch.tensor([2]), torch.tensor([1])
    sgl_kernel.assign_req_to_token_pool_cpu(
        row, table, nothing, nothing, torch.empty(0, dtype=torch.int64), 3
    )
    assert not table.any()


def test_the_stand_in_takes_what_the_cpu_engine_passes() -> None:
    parameters = inspect.signature(sgl_kernel.assign_req_to_token_pool_cpu).parameters
    assert len(parameters) == 6


def test_any_other_kernel_is_importable_and_names_itself_when_called() -> None:
    from sgl_kernel import fused_experts, silu_and_mul

    assert fused_experts is not silu_and_mul
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.silu_and_mul"):
        silu_and_mul(torch.zeros(1))


def test_submodules_and_special_names_do_not_exist() -> None:
    with pytest.raises(ModuleNotFoundError):
        __import__("sgl_kernel.flash_attn")
    with pytest.raises(AttributeError):
        _ = sgl_kernel.__wrapped__


def test_starting_python_or_looking_for_torchvision_does_not_import_torch() -> None:
    printed = _run_python(
        "import importlib.util, sys; importlib.util.find_spec('torchvision');"
        "print('torch' in sys.modules, [f.__name__ for f in sys.meta_path if 'Torchv' in str(f)])"
    )
    assert printed == "False ['TorchvisionFinder']"


def test_torchvision_imports_and_its_transforms_work() -> None:
    printed = _run_python(
        "import torch, torchvision.transforms.functional as F;"
        "print(tuple(F.center_crop(torch.zeros(3, 8, 8), 4).shape),"
        " torch.ops.torchvision.nms.default._schema)"
    )
    assert printed == (
        "(3, 4, 4) torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )


def test_nothing_is_declared_when_torchvisions_own_library_loads(tmp_path: Path) -> None:
    shutil.copy(_ctypes.__file__, tmp_path / "_C.so")  # any library that loads
    printed = _run_python(
        "import torch, cpu_torchvision_operators as c; from pathlib import Path;"
        f"print(c.declare_missing_operators(Path({str(tmp_path)!r})),"
        " hasattr(torch.ops.torchvision, 'nms'))"
    )
    assert printed == "False False"


def test_nothing_is_declared_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not declare_missing_operators(tmp_path)


def test_an_absent_torchvision_is_left_to_python(tmp_path: Path) -> None:
    assert TorchvisionFinder.find_spec("torchvision", [str(tmp_path)]) is None
    assert TorchvisionFinder.find_spec("torch") is None


def test_the_stand_ins_are_a_distribution_of_their_own() -> None:
    files = importlib.metadata.files("sglang-alloc-cpu-engine")
    assert files is not None
    names = {str(file) for file in files}
    assert {"sgl_kernel/__init__.py", "cpu_torchvision_operators.pth"} <= names
    assert OPERATORS == ("nms", "qnms")
