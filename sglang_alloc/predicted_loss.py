"""Contract between the stories: the loss that a budget of a table costs in the mode it serves."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sglang_alloc.allocation_mode import MODES, Phase, is_supported, mode_of_phase
from sglang_alloc.shared_table import SharedTable

# The first section that is present counts. Mode `token` keeps the same number of slots as `layer`
# and has no sensitivities of its own: the quotas' loss bounds it from above.
_LOSSES = {
    ("layer", "decode"): ("predicted_loss",),
    ("layer", "prefill"): ("prefill_predicted_loss", "predicted_loss"),
    ("threshold", "decode"): ("threshold_predicted_loss", "predicted_loss"),
    ("threshold", "prefill"): (
        "prefill_threshold_loss",
        "threshold_predicted_loss",
        "prefill_predicted_loss",
        "predicted_loss",
    ),
    ("union", "decode"): ("union_predicted_loss", "predicted_loss"),
}


def predicted_loss(table: SharedTable, phase: Phase) -> npt.NDArray[np.float32]:
    """Return the predicted loss (N,) in nats per token of every budget, as `phase` pays it.

    It is that of the mode which the table was published for. A table that was published for any
    mode gets the largest of its modes' losses, so that no quality floor is too low.
    """
    note = table.mode_note
    if note in MODES:
        return _loss_of(table, note, phase)
    possible = [mode for mode in MODES if is_supported(mode, table.has_section)]
    losses = np.stack([_loss_of(table, mode, phase) for mode in possible])
    worst: npt.NDArray[np.float32] = losses.max(axis=0)
    return worst


def _loss_of(table: SharedTable, mode: str, phase: Phase) -> npt.NDArray[np.float32]:
    return table.section(loss_section(mode, phase, table.has_section))


def loss_section(mode: str, phase: Phase, has_section: Callable[[str], bool]) -> str:
    """Return the name of the array with the predicted losses (N,) of `mode` in `phase`."""
    obeyed = mode_of_phase(mode, phase, has_section)
    names = _LOSSES["layer" if obeyed == "token" else obeyed, phase]
    return next(name for name in names if has_section(name))
