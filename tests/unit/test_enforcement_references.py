"""Reference renormalisation where budgets are enforced: host and device, and in one mode only."""

from pathlib import Path

import numpy as np
import pytest
import torch
from table_factory import make_full_tables, make_tables

from sglang_alloc.allocation_mode import Mode
from sglang_alloc.enforcement import Enforcement, EnforcementTables, PhaseRows, RoutedSlots
from sglang_alloc.enforcement_device import DeviceEnforcement
from sglang_alloc.enforcement_host import HostEnforcement
from sglang_alloc.shared_table import SharedTable, publish_shared_table
from sglang_alloc.worker_tables import enforcement_tables
from sglang_alloc_kernels.slot_rules import TWINS

WEIGHTS, IDS = torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([[5, 2, 0, 1]])
BUDGETS = np.arange(1, 5)


def _tables(mode: Mode) -> EnforcementTables:
    thresholds = np.array([[0.35], [0.25], [0.15], [0.0]], np.float32)
    references = np.array([[3], [3], [1], [1]], np.int16)
    rows = PhaseRows(BUDGETS[:, None].astype(np.int16), thresholds, None, references)
    return EnforcementTables(mode, 4, 1, 4, rows, rows, None, 6)


def _enforcement(kind: str, mode: Mode) -> Enforcement:
    if kind == "host":
        return HostEnforcement(_tables(mode))
    return DeviceEnforcement(_tables(mode), torch.device("cpu"), TWINS)


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("mode", ["threshold", "layer"])
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, [0.4 / 0.9, 0.0, 0.0, 0.0]),
        (2, [0.4 / 0.9, 0.3 / 0.9, 0.0, 0.0]),
        (3, [0.4 / 0.9, 0.3 / 0.9, 0.2 / 0.9, 0.0]),
        (4, [0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_kept_weights_are_normalised_by_their_reference(
    kind: str, mode: Mode, budget: int, expected: list[float]
) -> None:
    enforcement = _enforcement(kind, mode)
    enforcement.set_budgets(budget, budget)
    enforcement.begin_forward("decode")
    found = enforcement.drop(0, RoutedSlots(WEIGHTS, IDS, 0))
    torch.testing.assert_close(found.weights, torch.tensor([expected]))


def test_corrections_belong_to_the_mode_they_were_calibrated_for(tmp_path: Path) -> None:
    publish_shared_table(tmp_path / "t.tbl", make_full_tables())
    with SharedTable.open(tmp_path / "t.tbl") as table:
        served = enforcement_tables(table, "threshold")
        assert served.decode.references is not None
        # Prefill has rows of its own here, for which decode's corrections were not made.
        assert (served.prefill.gains == table.section("prefill_gains")).all()
        assert served.prefill.references is None
        assert enforcement_tables(table, "layer").decode.references is None
        assert enforcement_tables(table, "token").decode.gains is None
    plain = make_tables(gains=np.ones((10, 3), np.float32))
    publish_shared_table(tmp_path / "plain.tbl", plain)
    with SharedTable.open(tmp_path / "plain.tbl") as table:
        served = enforcement_tables(table, "layer")
        assert served.decode.gains is not None
        assert (served.prefill.gains == served.decode.gains).all()
