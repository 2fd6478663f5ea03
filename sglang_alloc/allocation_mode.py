"""Contract between the stories: phases, modes, and which mode a table can be served in."""

from collections.abc import Callable
from typing import Literal, NamedTuple, cast, get_args

from sglang_alloc.errors import ConfigurationError

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, Phase] = ("prefill", "decode")
Mode = Literal["layer", "token", "threshold", "union"]
MODES: tuple[Mode, ...] = get_args(Mode)
# What a table of probes may ask to be recorded: the experts' saliency, their outputs on Gaussian
# input, or gains.
Recording = Literal["saliency", "lexi", "gains"]
_PROBE_NOTE = "probe:"

# One of these sections has to be there.
_NEEDED = {"threshold": ("thresholds",), "union": ("union_quotas", "union_thresholds")}
_MADE_BY = {
    "threshold": "`sglang-alloc calibrate`",
    "union": "`sglang-alloc calibrate`, or `sglang-alloc profile --mode union` and solve",
}


class Probe(NamedTuple):
    """What a table of probes is for: the mode that is profiled, and what is recorded meanwhile."""

    mode: Mode
    records: Recording | None = None


def note_of_probe(probe: Probe) -> str:
    """Return the mode note of a table of probes, which nobody may serve."""
    return f"{_PROBE_NOTE}{probe.mode}" + (f"+{probe.records}" if probe.records else "")


def probe_of_note(note: str) -> Probe | None:
    """Return what `note_of_probe` noted; None for any other table.

    Raises:
        ConfigurationError: it is a note of probes that this version does not know.
    """
    if not note.startswith(_PROBE_NOTE):
        return None
    mode, _, records = note.removeprefix(_PROBE_NOTE).partition("+")
    if mode not in MODES or records not in {"", *get_args(Recording)}:
        raise ConfigurationError(
            f"The table's note {note!r} asks for a probe that this version does not know. Profile "
            "with the version that serves."
        )
    return Probe(mode, cast(Recording, records) if records else None)


def default_mode(has_section: Callable[[str], bool]) -> Mode:
    """Return the mode of a table that nobody chose one for: the best that it supports."""
    return "threshold" if has_section("thresholds") else "layer"


def mode_of_phase(mode: str, phase: Phase, has_section: Callable[[str], bool]) -> str:
    """Return the mode that a phase obeys: `union` is a rule of decode steps alone.

    A prefill of thousands of tokens opens every expert whatever its rule, so prefill takes the best
    mode that the table supports.
    """
    return default_mode(has_section) if (mode, phase) == ("union", "prefill") else mode


def require_support(mode: str, has_section: Callable[[str], bool], model_id: str) -> None:
    """Raise `ConfigurationError` when a table with these sections cannot serve `mode`."""
    if not is_supported(mode, has_section):
        needed = " or ".join(_NEEDED[mode])
        raise ConfigurationError(
            f"Mode {mode} was asked for, but the table of {model_id} holds no {needed}. Use mode "
            f"layer or token, or make tables that hold them with {_MADE_BY[mode]}."
        )


def is_supported(mode: str, has_section: Callable[[str], bool]) -> bool:
    """Return whether a table with these sections can serve `mode`."""
    needed = _NEEDED.get(mode, ())
    return not needed or any(map(has_section, needed))
