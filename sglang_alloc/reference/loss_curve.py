"""Reference model: draw the loss curve (needs the `report` extra)."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sglang_alloc.reference.training_state import HistoryRow


def plot_loss_curve(path: Path, history: list[HistoryRow], domains: tuple[str, ...]) -> None:
    """Write a PNG of training loss and of each domain's held-out loss against bytes seen."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    millions = [row.tokens / 1e6 for row in history]
    axes.plot(millions, [row.train_loss for row in history], color="0.7", label="training")
    measured = [row for row in history if row.heldout]
    measured_millions = [row.tokens / 1e6 for row in measured]
    for domain in domains:
        losses = [row.heldout[domain] for row in measured if row.heldout]
        axes.plot(measured_millions, losses, marker=".", label=f"held-out {domain}")
    axes.set(xlabel="bytes seen (millions)", ylabel="loss (nats per byte)", ylim=(0.5, 4))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
