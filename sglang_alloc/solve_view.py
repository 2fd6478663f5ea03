"""Offline story, solving: the quotas of every budget for people, as a table and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sglang_alloc.atomic_file import replace_file
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.solve import Solution

_ROWS_SHOWN = 13
_PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def solution_text(solution: Solution, layer_ids: Sequence[int]) -> str:
    """Return evenly spaced budgets, the full one first: spent, predicted loss, quotas by layer."""
    picks = np.linspace(len(solution.budgets) - 1, 0, _ROWS_SHOWN).round().astype(int)
    width = max(len(str(layer)) for layer in layer_ids)
    lines = [
        f"{'budget':>6} {'spent':>6} {'loss':>9}  quota of layer "
        + " ".join(f"{layer:>{width}}" for layer in layer_ids)
    ]
    indent = " " * len("quota of layer ")
    for row in dict.fromkeys(picks.tolist()):
        quotas = " ".join(f"{quota:>{width}}" for quota in solution.quotas[row])
        lines.append(
            f"{solution.budgets[row]:>6} {solution.quotas[row].sum():>6} "
            f"{solution.predicted_loss[row]:>9.4f}  {indent}{quotas}"
        )
    return "\n".join(lines)


def require_picture(path: Path) -> None:
    """Raise `ConfigurationError` when `write_picture` could not draw such a file here."""
    if find_spec("matplotlib") is None:
        raise ConfigurationError(
            "A picture needs matplotlib: install it from the clone with `pip install '.[report]'`, "
            "or leave --plot out."
        )
    if path.suffix.lower() not in ("", *_PICTURE_SUFFIXES):
        raise ConfigurationError(
            f"A picture {path} was asked for, and its kind is told by the suffix: give one of "
            f"{', '.join(_PICTURE_SUFFIXES)}."
        )


def write_picture(path: Path, solution: Solution, layer_ids: Sequence[int], title: str) -> None:
    """Draw quotas by layer and budget over predicted loss by budget, in the suffix's format.

    Raises:
        ConfigurationError: as `require_picture`, or the picture cannot be written.
    """
    require_picture(path)
    import matplotlib as mpl
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure

    budgets, top_k = solution.budgets, int(solution.quotas.max())
    figure = Figure(
        figsize=(9.6, 2.6 + max(1.6, 0.22 * len(layer_ids)) + 2.2), layout="constrained"
    )
    above, below = figure.subplots(
        2, 1, sharex=True, height_ratios=(max(1.6, 0.22 * len(layer_ids)), 2.0)
    )
    image = above.pcolormesh(
        np.arange(budgets[0], budgets[-1] + 2) - 0.5,
        np.arange(len(layer_ids) + 1) - 0.5,
        solution.quotas.T,
        cmap=mpl.colormaps["viridis"],
        norm=BoundaryNorm(np.arange(0.5, top_k + 1), mpl.colormaps["viridis"].N),
    )
    above.invert_yaxis()
    step = max(1, len(layer_ids) // 16)
    above.set_yticks(range(0, len(layer_ids), step), [str(i) for i in layer_ids[::step]])
    above.set_ylabel("MoE layer")
    above.set_title(title, loc="left")
    figure.colorbar(image, ax=above, label="experts kept", ticks=range(1, top_k + 1))
    below.plot(budgets, solution.predicted_loss, color="#0b6e69")
    below.set_xlabel("budget: activations per token over all layers")
    below.set_ylabel("predicted loss\n(nats per token)")
    below.grid(color="#eceef1")
    below.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix(".").lower() or "png", dpi=130)
    _write(path, content.getvalue())


def _write(path: Path, content: bytes) -> None:
    try:
        replace_file(path, content, mode=0o644)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot write the picture to {path}: {error.strerror}. Choose a folder that this user "
            "can write to."
        ) from error
