"""`sglang-alloc profile`, behind its options: run, write, and say what it cost."""

import os
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from sglang_alloc.cli_interruption import interruptible
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.launch_checks import require_plugin_allowed, require_sglang
from sglang_alloc.moe_layers import read_model_folder
from sglang_alloc.profile_progress import TokenProgress
from sglang_alloc.profile_run import Profile, run_profile, work_folder
from sglang_alloc.profile_settings import ProfileJob, ProfileSettings
from sglang_alloc.profile_windows import read_text
from sglang_alloc.sensitivity_file import save_sensitivities
from sglang_alloc.server_runs.reference_files import REFERENCE


def make_job(
    model_path: Path,
    texts: Sequence[Path],
    settings: ProfileSettings,
    *,
    model_id: str | None,
    output: Path,
    arguments: Sequence[str],
) -> ProfileJob:
    """Check what can be checked before a server is started.

    Raises:
        AllocError: no supported SGLang, no MoE checkpoint, or no readable text.
    """
    require_sglang()
    require_plugin_allowed(os.environ)
    model = read_model_folder(model_path)
    paths = list(texts) or sorted((REFERENCE / "samples").glob("calibration_*.txt"))
    if not paths:
        raise ConfigurationError("There is no bundled calibration text here: give --text FILE.")
    return ProfileJob(
        model=model,
        model_id=model_id or model_path.resolve().name,
        texts=tuple(read_text(paths)),
        folder=work_folder(output),
        server_arguments=tuple(arguments),
        settings=settings,
    )


def profile_to_file(job: ProfileJob, output: Path) -> None:
    """Profile and write `output`; an interruption keeps what was measured and exits with 130."""
    kept = job.folder
    with (
        interruptible(
            f"Interrupted. What was measured is in {kept}; the same command goes on from there."
        ),
        TokenProgress(Console(stderr=True)) as progress,
    ):
        found = run_profile(job, progress)
    save_sensitivities(output, found.sensitivities)
    typer.echo(_summary(found, output))


def _summary(found: Profile, output: Path) -> str:
    cost = found.cost
    return (
        f"Wrote {output}: {len(found.sensitivities.sensitivity)} MoE layers, top-"
        f"{found.sensitivities.top_k}. It took {cost.forward_tokens:,} forward tokens, "
        f"{cost.ratio:.0%} of the {cost.naive_tokens:,} of every layer and k over all windows."
    )
