"""`sglang-alloc profile`: what each layer loses when it keeps fewer experts, through the engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer


def profile(
    context: typer.Context,
    *,
    model_path: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The checkpoint, as SGLang is to serve it.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="SENSITIVITY.npz", help="Where to write.")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Calibration text, UTF-8. Repeatable. Default: bundled text."
        ),
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name for people. Default: the folder's.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="MODE,...",
            help="That will serve. threshold: `serve` prefers it because it loses least; it takes "
            "more probes than layer, and its tables, from `calibrate`, serve layer too. layer: "
            "enough for modes layer and token, and `solve` makes the tables. union: for that mode "
            "where tables are solved without thresholds.",
        ),
    ] = "layer",
    phase: Annotated[
        str, typer.Option(metavar="PHASE,...", help="decode, prefill.")
    ] = "decode,prefill",
    probe_context: Annotated[
        Literal["isolated", "target", "paper", "lexi"],
        typer.Option(
            "--context",
            help="The other layers: full, at --target-quota, or full before and top-1 after. lexi "
            "measures each layer on Gaussian input instead, without any text.",
        ),
    ] = "isolated",
    target_quota: Annotated[
        float | None, typer.Option(metavar="K", help="For --context target.")
    ] = None,
    metric: Annotated[
        Literal["nll", "perplexity", "kl"], typer.Option(help="What is lost.")
    ] = "nll",
    windows: Annotated[int, typer.Option(min=2, help="Pieces of text.")] = 32,
    prefix_tokens: Annotated[int, typer.Option(min=2, help="Of each piece.")] = 384,
    continuation_tokens: Annotated[int, typer.Option(min=2, help="Scored, of each piece.")] = 128,
    chunk: Annotated[int, typer.Option(min=1, help="Windows in one request.")] = 8,
    union_steps: Annotated[
        int, typer.Option(min=1, help="Tokens decoded one by one, mode union.")
    ] = 16,
    measure: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...",
            help="Kept experts that are measured; the others are interpolated. Default: each up "
            "to half the top-k, every second above.",
            show_default=False,
        ),
    ] = None,
    relative_error: Annotated[
        float, typer.Option(min=0.0, help="A probe stops at this standard error of its loss,")
    ] = 0.1,
    absolute_error_nats: Annotated[
        float, typer.Option(min=0.0, help="or at this one. 0 and 0: all windows.")
    ] = 0.0005,
) -> None:
    """Measure the sensitivities of a model with a real SGLang server that is started for it.

    Everything after [bold]--[/] goes to SGLang. Ctrl-C keeps what was measured; the same command
    goes on from there.
    """
    # Imported here because help must not wait for numpy.
    from sglang_alloc.allocation_mode import PHASES, Phase
    from sglang_alloc.cli_profile_run import make_job, profile_to_file
    from sglang_alloc.profile_settings import ProfiledMode, ProfileSettings

    settings = ProfileSettings(
        modes=cast("tuple[ProfiledMode, ...]", _words("--mode", mode, get_args(ProfiledMode))),
        phases=cast("tuple[Phase, ...]", _words("--phase", phase, PHASES)),
        context=probe_context,
        target_quota=target_quota,
        metric=metric,
        windows=windows,
        prefix_tokens=prefix_tokens,
        continuation_tokens=continuation_tokens,
        chunk_windows=chunk,
        measured=_counts(measure),
        relative_error=relative_error,
        absolute_error_nats=absolute_error_nats,
        union_steps=union_steps,
    )
    job = make_job(
        model_path, text or [], settings, model_id=model_id, output=output, arguments=context.args
    )
    profile_to_file(job, output)


def _words(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    from sglang_alloc.errors import ConfigurationError

    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        raise ConfigurationError(
            f"{option} {text!r} names {', '.join(unknown) or 'nothing'}: give one or several of "
            f"{', '.join(known)}, with commas between."
        )
    return words


def _counts(text: str | None) -> tuple[float, ...] | None:
    from sglang_alloc.errors import ConfigurationError

    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(
            f"--measure {text} is not a list of numbers: give kept experts, for example 1,2,4,8."
        ) from error
