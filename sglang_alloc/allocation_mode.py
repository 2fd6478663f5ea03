"""Contract between the stories: the mode a table is served in, and the loss that counts then."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.shared_table import SharedTable

MODES = ("layer", "token", "threshold", "union")
# The note of a table of probes, before the mode that is profiled: nobody may serve it. Behind the
# mode it may ask for something to be recorded: the experts' saliency, their outputs on Gaussian
# input, or gains.
PROBE_NOTE = "probe:"
SALIENCY_NOTE = "+saliency"
LEXI_NOTE = "+lexi"
GAINS_NOTE = "+gains"

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
# One of these sections has to be there.
_NEEDED = {"threshold": ("thresholds",), "union": ("union_quotas", "union_thresholds")}
_MADE_BY = {
    "threshold": "`sglang-alloc calibrate`",
    "union": "`sglang-alloc calibrate`, or `sglang-alloc profile --mode union` and solve",
}


def default_mode(has_section: Callable[[str], bool]) -> str:
    """Return the mode of a table that nobody chose one for: the best that it supports."""
    return "threshold" if has_section("thresholds") else "layer"


def mode_of_phase(
    mode: str, phase: Literal["prefill", "decode"], has_section: Callable[[str], bool]
) -> str:
    """Return the mode that a phase obeys: `union` is a rule of decode steps alone.

    A prefill of thousands of tokens opens every expert whatever its rule, so prefill takes the best
    mode that the table supports.
    """
    return default_mode(has_section) if (mode, phase) == ("union", "prefill") else mode


def require_support(mode: str, has_section: Callable[[str], bool], model_id: str) -> None:
    """Raise `ConfigurationError` when a table with these sections cannot serve `mode`."""
    if not _is_supported(mode, has_section):
        needed = " or ".join(_NEEDED[mode])
        raise ConfigurationError(
            f"Mode {mode} was asked for, but the table of {model_id} holds no {needed}. Use mode "
            f"layer or token, or make tables that hold them with {_MADE_BY[mode]}."
        )


def _is_supported(mode: str, has_section: Callable[[str], bool]) -> bool:
    needed = _NEEDED.get(mode, ())
    return not needed or any(map(has_section, needed))


def predicted_loss(
    table: SharedTable, phase: Literal["prefill", "decode"]
) -> npt.NDArray[np.float32]:
    """Return the predicted loss (N,) in nats per token of every budget, as `phase` pays it.

    It is that of the mode which the table was published for. A table that was published for any
    mode gets the largest of its modes' losses, so that no quality floor is too low.
    """
    note = table.mode_note
    if note in MODES:
        return _loss_of(table, note, phase)
    possible = ["layer", *(mode for mode in _NEEDED if _is_supported(mode, table.has_section))]
    losses = np.stack([_loss_of(table, mode, phase) for mode in possible])
    worst: npt.NDArray[np.float32] = losses.max(axis=0)
    return worst


def _loss_of(
    table: SharedTable, mode: str, phase: Literal["prefill", "decode"]
) -> npt.NDArray[np.float32]:
    return table.section(loss_section(mode, phase, table.has_section))


def loss_section(
    mode: str, phase: Literal["prefill", "decode"], has_section: Callable[[str], bool]
) -> str:
    """Return the name of the array with the predicted losses (N,) of `mode` in `phase`."""
    obeyed = mode_of_phase(mode, phase, has_section)
    names = _LOSSES["layer" if obeyed == "token" else obeyed, phase]
    return next(name for name in names if has_section(name))
