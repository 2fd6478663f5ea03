"""Reference model: fill its folder with weights, loss curve, recipe and a README of the numbers."""

import csv
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from sglang_alloc.reference.architecture import config_to_dict
from sglang_alloc.reference.corpus import Manifest
from sglang_alloc.reference.export import export_checkpoint, load_checkpoint
from sglang_alloc.reference.heldout import heldout_losses, windows_of
from sglang_alloc.reference.loss_curve import plot_loss_curve
from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.recipe import Recipe
from sglang_alloc.reference.samples import read_sample
from sglang_alloc.reference.training_state import HistoryRow, TrainingState

SAMPLE_WINDOW_TOKENS = 1_024
MADE_UP_TEXT = """- {share:.0%} of the windows are made-up problems with one right answer (`tasks`:
  copy, reverse and sort letters, recall a value by its key), so that exact answers can be asked
  of it. A tenth of all problems, chosen by hash, is never trained on.
"""


def model_folder(family: str) -> Path:
    """Where the repository keeps a family's reference model."""
    return Path(__file__).parent / f"{family.replace('_', '-')}-ref"


def write_model_folder(
    folder: Path, model: ReferenceModel, recipe: Recipe, manifest: Manifest, state: TrainingState
) -> None:
    """Export the model and measure the exported bfloat16 weights on the committed samples."""
    domains = tuple(manifest)
    export_checkpoint(model, folder)
    write_loss_curve(folder / "loss_curve.csv", state.history, domains)
    plot_loss_curve(folder / "loss_curve.png", state.history, domains)
    samples = {
        domain: windows_of(tokens, SAMPLE_WINDOW_TOKENS, 1_000)
        for domain, tokens in read_sample("heldout").items()
    }
    losses = heldout_losses(load_checkpoint(folder), samples)
    last = state.history[-1]
    record = {
        "architecture": config_to_dict(model.config),
        "recipe": asdict(recipe),
        "corpus": manifest,
        "steps": state.step,
        "tokens": last.tokens,
        "minutes": round(state.seconds / 60, 1),
        "final_train_loss": round(last.train_loss, 4),
        "heldout_documents_loss": {d: round(v, 4) for d, v in (last.heldout or {}).items()},
        "heldout_sample_loss": {d: round(v, 4) for d, v in losses.items()},
        "loss_unit": "nats per byte",
        "processor": f"a shared machine with {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(readme_text(model, recipe, record, losses))


def write_loss_curve(path: Path, history: list[HistoryRow], domains: tuple[str, ...]) -> None:
    """One row per report; held-out columns are empty where they were not measured."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["step", "tokens", "seconds", "learning_rate", "train_loss", "balance_loss",
                       *(f"heldout_{d}_loss" for d in domains)])  # fmt: skip
        for row in history:
            heldout = [f"{row.heldout[d]:.4f}" if row.heldout else "" for d in domains]
            numbers = (f"{row.train_loss:.4f}", f"{row.balance_loss:.4f}", *heldout)
            rate = f"{row.learning_rate:.3e}"
            rows.writerow([row.step, row.tokens, f"{row.seconds:.1f}", rate, *numbers])


def readme_text(
    model: ReferenceModel, recipe: Recipe, record: dict[str, object], losses: dict[str, float]
) -> str:
    """The folder's README: what the model is, how it came to be, and how good it is."""
    config = model.config
    parameters = sum(weight.numel() for weight in model.parameters())
    phases = ", then ".join(
        f"{p.steps} steps of {p.windows_per_step} windows of {p.window_tokens} bytes"
        for p in recipe.phases
    )
    table = "\n".join(f"| {domain} | {loss:.3f} |" for domain, loss in losses.items())
    made_up = MADE_UP_TEXT.format(share=recipe.synthetic_share) if recipe.synthetic_share else ""
    return f"""# {config.family} reference model

A small *trained* Mixture-of-Experts for the demo, the tests and the benches: its routing means
something, its answers do not.

- {config.num_layers} layers, {config.num_experts} experts in each, top-{config.top_k}, hidden size
  {config.hidden_size}, expert width {config.moe_intermediate_size}: {parameters / 1e6:.2f} million
  parameters, bfloat16.
- Byte-level tokenizer: a token id below 256 is the byte itself.
- **Trained context: {recipe.phases[-1].window_tokens} bytes.** SGLang accepts up to
  {config.max_positions}, but beyond the trained context the text and its loss mean nothing.
- Seen: {record["tokens"]} bytes in {record["minutes"]} minutes on {record["processor"]}:
  {phases}.
- Text: Python's standard library (code), package and system documentation (docs), manual pages
  (man), drawn equally. `recipe.json` holds the counts and digests of each split, `loss_curve.csv`
  and `loss_curve.png` the progress.
{made_up}
Loss of the exported weights on the committed held-out text (`../samples/heldout_*.txt`, windows of
{SAMPLE_WINDOW_TOKENS} bytes), nats per byte:

| domain | loss |
|---|---|
{table}

How the loss grows with a smaller budget: `BUDGETS.md`; which rule spends a budget best: `RULES.md`.

Made by, in this order, each with `--family {config.family}`:

1. `python -m sglang_alloc.reference.train` (resumes when interrupted; `--restart` starts anew)
2. `python -m sglang_alloc.reference.calibrate` (`budget_tables.npz`, `BUDGETS.md`)
3. `python -m sglang_alloc.reference.rule_survey` (`RULES.md`)
"""
