"""The model, its tables and its held-out text, as the command line names them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sglang_alloc.allocation_mode import MODES
from sglang_alloc.server_runs.errors import ServerRunError

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
MODEL = REFERENCE / "qwen3-moe-ref"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --tables, --text, --mode and --seed, by default the reference model's."""
    parser.add_argument("--model", type=Path, default=MODEL, help="MoE model that SGLang serves")
    parser.add_argument("--tables", type=Path, help="its budget tables (default: in its folder)")
    parser.add_argument("--text", type=Path, action="append", help="held-out text, repeatable")
    parser.add_argument("--mode", default="threshold", choices=MODES, help="mode of allocation")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn at random")


def tables_path(given: argparse.Namespace) -> Path:
    """Return the budget tables to publish."""
    path: Path = given.tables or given.model / "budget_tables.npz"
    return path


def heldout_texts(given: argparse.Namespace) -> list[str]:
    """Read the held-out text that `add_model_arguments` names; raises as `read_heldout` does."""
    return read_heldout(given.text or ())


def read_heldout(named: Sequence[Path]) -> list[str]:
    """Read the held-out text that prompts are cut from, by default the bundled one.

    Raises ServerRunError when there is none or it cannot be read.
    """
    paths = list(named) or sorted((REFERENCE / "samples").glob("heldout_*.txt"))
    if not paths:
        raise ServerRunError(
            f"no held-out text was found in {REFERENCE / 'samples'}, and prompts are cut from it: "
            "pass --text FILE, or restore the repository's own"
        )
    return [_read(path) for path in paths]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ServerRunError(f"held-out text {path} cannot be read as UTF-8: {error}") from error
