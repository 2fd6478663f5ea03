"""A server whose budget could not be enforced does not start, and its last words say why.

These start SGLang itself, not `sglang-alloc serve`, which would refuse earlier: the plugin must
hold alone. What cannot be had on a CPU (a GPU backend, another SGLang) is covered in tests/unit.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models

from sglang_alloc.plugin_entry import TABLE_VARIABLE
from sglang_alloc.server_runs.server_process import CPU_ENVIRONMENT, free_port, server_command
from sglang_alloc.shared_table import publish_shared_table
from sglang_alloc.worker_settings import MODE_VARIABLE

pytestmark = pytest.mark.server


def _refused(model: Path, environment: dict[str, str], extra_args: tuple[str, ...] = ()) -> str:
    """Start SGLang and return its output; it must end by itself, with a failure."""
    command = server_command(model, free_port(), table=None, mode=None, extra_args=extra_args)
    finished = subprocess.run(
        command,
        env={**os.environ, **CPU_ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        start_new_session=True,
    )
    assert finished.returncode != 0
    return finished.stdout + finished.stderr


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3_moe")


def test_a_missing_table_is_refused(model: Path, tmp_path: Path) -> None:
    output = _refused(model, {TABLE_VARIABLE: str(tmp_path / "none.tbl")})
    assert "sglang-alloc refuses to serve" in output
    assert "none.tbl" in output


def test_a_truncated_table_is_refused(model: Path, tiny_table: Callable[[Path], Path]) -> None:
    path = tiny_table(model)
    path.write_bytes(path.read_bytes()[:5000])
    output = _refused(model, {TABLE_VARIABLE: str(path)})
    assert "sglang-alloc refuses to serve" in output
    assert "truncated" in output


def test_an_unknown_mode_is_refused(model: Path, tiny_table: Callable[[Path], Path]) -> None:
    output = _refused(model, {TABLE_VARIABLE: str(tiny_table(model)), MODE_VARIABLE: "fastest"})
    assert "SGLANG_ALLOC_MODE='fastest' is not a mode of allocation" in output


def test_a_table_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.tbl"
    other = replace(tiny_models.make_tables(model), model_id="another-model", fingerprint="ab" * 32)
    publish_shared_table(path, other)
    output = _refused(model, {TABLE_VARIABLE: str(path)})
    assert "was made for 'another-model' and does not fit the served model" in output


def test_a_dense_model_is_refused(
    model: Path, tiny_model: Callable[[str], Path], tiny_table: Callable[[Path], Path]
) -> None:
    output = _refused(tiny_model("qwen3_dense"), {TABLE_VARIABLE: str(tiny_table(model))})
    assert "has no Mixture-of-Experts layer" in output


def test_an_option_that_breaks_the_budget_is_refused(
    model: Path, tiny_table: Callable[[Path], Path]
) -> None:
    table = {TABLE_VARIABLE: str(tiny_table(model))}
    output = _refused(model, table, extra_args=("--enable-torch-compile",))
    assert "--enable-torch-compile True is not supported" in output
