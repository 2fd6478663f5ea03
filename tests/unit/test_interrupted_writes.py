"""A write that a full disk or a kill ends leaves the file that was there, whole."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from table_factory import make_tables

from sglang_alloc.budget_tables import load_budget_tables, save_budget_tables
from sglang_alloc.sensitivity_file import Sensitivities, load_sensitivities, save_sensitivities

# The kernel refuses to let a file of the process grow further, as on a full disk.
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
"""
# Everything is written, and the process dies before the new file has its name.
KILLED = """
import os, signal
import sglang_alloc.atomic_file as atomic_file
atomic_file.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""
SAVE_TABLES = """
from pathlib import Path
from table_factory import make_full_tables
from sglang_alloc.budget_tables import save_budget_tables
save_budget_tables(Path({path!r}), make_full_tables())
"""
SAVE_SENSITIVITIES = """
from pathlib import Path
import numpy as np
from sglang_alloc.sensitivity_file import Sensitivities, save_sensitivities
save_sensitivities(Path({path!r}), Sensitivities(np.random.default_rng(0).random((40, 8))))
"""


def _run(program: str) -> subprocess.CompletedProcess[str]:
    beside = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
    command = [sys.executable, "-c", f"{beside}\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("trouble", "status", "said"),
    [(FULL_DISK, 1, "Cannot write"), (KILLED, -signal.SIGKILL, "")],
    ids=["full disk", "killed"],
)
def test_budget_tables_stay_as_they_were(
    tmp_path: Path, trouble: str, status: int, said: str
) -> None:
    path = tmp_path / "tables.npz"
    save_budget_tables(path, make_tables(provenance={"run": 1}))
    ended = _run(trouble + SAVE_TABLES.format(path=str(path)))
    assert ended.returncode == status
    assert said in ended.stderr
    assert load_budget_tables(path).provenance == {"run": 1}


@pytest.mark.parametrize(
    ("trouble", "status"), [(FULL_DISK, 1), (KILLED, -signal.SIGKILL)], ids=["full disk", "killed"]
)
@pytest.mark.parametrize("existed", [False, True])
def test_sensitivities_stay_as_they_were(
    tmp_path: Path, trouble: str, status: int, existed: bool
) -> None:
    path = tmp_path / "s.npz"
    if existed:
        save_sensitivities(path, Sensitivities(np.ones((2, 3))))
    ended = _run(trouble + SAVE_SENSITIVITIES.format(path=str(path)))
    assert ended.returncode == status
    assert path.exists() == existed
    if existed:
        np.testing.assert_array_equal(load_sensitivities(path).sensitivity, np.ones((2, 3)))


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    _run(FULL_DISK + SAVE_SENSITIVITIES.format(path=str(tmp_path / "s.npz")))
    assert list(tmp_path.iterdir()) == []
