"""Offline story, profiling: from a model folder and text to sensitivities, through real servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sglang_alloc.allocation_mode import Phase, Probe, note_of_probe
from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.lexi_record import FILE_NAME as LEXI_FILE
from sglang_alloc.moe_layers import weights_digest
from sglang_alloc.npz_file import read_npz
from sglang_alloc.profile_engine import ProfiledServer, profiled_server
from sglang_alloc.profile_journal import ProfileJournal
from sglang_alloc.profile_plan import (
    ProbePlan,
    default_measured,
    default_measured_of_prefill,
    make_plan,
    sensitivity_of,
)
from sglang_alloc.profile_series import Series
from sglang_alloc.profile_settings import ProfiledMode, ProfileJob
from sglang_alloc.profile_windows import (
    Window,
    cut_windows,
    digest,
    require_room_for_windows,
    require_vocabulary,
)
from sglang_alloc.saliency_record import FILE_NAME as SALIENCY_FILE
from sglang_alloc.saliency_record import saliency_of
from sglang_alloc.sensitivity_file import HALF_SLOTS, ProfiledModel, Sensitivities


class Progress(Protocol):
    """Whoever is told how far the profile is."""

    def stage(self, name: str, total_tokens: int) -> None:
        """A stage begins that forwards at most so many tokens."""

    def advance(self, tokens: int, tokens_left: int) -> None:
        """Tokens were forwarded, and at most so many are left in the stage."""

    def wait(self, text: str) -> None:
        """A server is starting."""


class Cost(NamedTuple):
    """Tokens forwarded, and what every layer at every k over whole windows would have taken."""

    forward_tokens: int
    naive_tokens: int

    @property
    def ratio(self) -> float:
        """The share of the naive cost."""
        return self.forward_tokens / self.naive_tokens


class Profile(NamedTuple):
    """What was measured, and what it cost."""

    sensitivities: Sensitivities
    cost: Cost


def run_profile(job: ProfileJob, progress: Progress) -> Profile:
    """Measure everything the job asks for, going on from what its folder holds.

    Raises:
        ConfigurationError: the folder holds another profile, or the text does not do.
        ProfileError, ProcessDiedError: the engine failed; what was measured is kept.
    """
    if job.settings.context == "lexi":
        return _lexi(job, progress)
    require_fit(job)
    identity = job.settings.identity(job.model, job.model_id, "\f".join(job.texts))
    series: list[Series] = []
    journal = ProfileJournal(job.folder / "journal.jsonl", identity)
    if journal.pinned("saliency") is None:
        (job.folder / SALIENCY_FILE).unlink(missing_ok=True)
    for mode in job.settings.modes:
        series += _measure_mode(job, mode, journal, progress)
    return _assembled(job, series, _known_saliency(job, journal))


def require_fit(job: ProfileJob) -> None:
    """Raise `ConfigurationError` for settings that this model or this text cannot fulfil.

    Nothing is written and no server started for it.
    """
    settings = job.settings
    require_room_for_windows(
        job.texts, settings.prefix_tokens, settings.continuation_tokens, settings.windows
    )
    for mode in settings.modes:
        _plan(job, mode)


@contextmanager
def serving(
    job: ProfileJob,
    plan: ProbePlan,
    probe: Probe,
    saliency: npt.NDArray[np.float64] | None,
    progress: Progress,
) -> Iterator[ProfiledServer]:
    """Serve the model under the plan's rows as probes."""
    with serving_tables(job, probe_tables(job, plan, saliency), probe, progress) as server:
        yield server


@contextmanager
def serving_tables(
    job: ProfileJob, probes: BudgetTables, probe: Probe, progress: Progress
) -> Iterator[ProfiledServer]:
    """Serve the model under a table of probes."""
    with profiled_server(
        job.model.path,
        probes,
        note_of_probe(probe),
        folder=job.folder,
        arguments=job.server_arguments,
        on_wait=progress.wait,
    ) as server:
        yield server


def probe_tables(
    job: ProfileJob,
    plan: ProbePlan,
    saliency: npt.NDArray[np.float64] | None,
    *,
    references: npt.NDArray[np.int16] | None = None,
    gains: npt.NDArray[np.float64] | None = None,
) -> BudgetTables:
    """Return a plan's rows as a table of probes; fractions of slots are for mode `threshold`.

    `references` and `gains` (P, L) correct the kept weights; a gain of 0 is to be found.
    """
    identity, rows = job.model.identity, len(plan.rows)
    return BudgetTables(
        model_id=job.model_id,
        fingerprint=identity.fingerprint(),
        num_experts=identity.num_experts,
        top_k=identity.top_k,
        layer_ids=np.array(job.model.layer_ids, np.int32),
        budgets=np.arange(1, rows + 1, dtype=np.int32),
        quotas=np.ceil(plan.rows).astype(np.int16),
        predicted_loss=np.zeros(rows, np.float32),
        threshold_quotas=plan.rows.astype(np.float32),
        references=references,
        gains=gains,
        saliency=saliency,
        probes=True,
    )


def windows_of(
    job: ProfileJob, server: ProfiledServer, journal: ProfileJournal | None
) -> list[Window]:
    """Tokenize the texts and cut them; a journal sees to it that the windows stay the same."""
    settings = job.settings
    tokens = server.tokenize(job.texts)
    windows = cut_windows(
        tokens, settings.prefix_tokens, settings.continuation_tokens, settings.windows
    )
    require_vocabulary(windows, job.model.identity.vocab_size)
    if journal is not None:
        journal.pin("windows_sha256", digest(windows))
    return windows


def require_plausible(full_loss: float, vocab_size: int) -> None:
    """Raise `ConfigurationError` when the full model predicts the text worse than by guessing."""
    if full_loss > np.log(vocab_size):
        raise ConfigurationError(
            f"The full model loses {full_loss:.2f} nats per token on this text, and guessing among "
            f"{vocab_size} tokens would lose {np.log(vocab_size):.2f}: is it text for this "
            "model, and its own tokenizer? No sensitivity would mean anything."
        )


def _measure_mode(
    job: ProfileJob, mode: ProfiledMode, journal: ProfileJournal, progress: Progress
) -> list[Series]:
    settings, plan = job.settings, _plan(job, mode)
    phases: tuple[Phase, ...] = ("decode",) if mode == "union" else settings.phases
    saliency = _known_saliency(job, journal) if mode == "threshold" else None
    records = mode == "threshold" and saliency is None
    probe = Probe(mode, "saliency" if records else None)
    with serving(job, plan, probe, saliency, progress) as server:
        windows = windows_of(job, server, journal)
        if records:
            _record_saliency(job, server, plan, windows, progress)
            journal.pin("saliency", "measured")
        all_series = [
            Series(f"{mode}:{phase}", phase, _thinned(job, plan, phase), settings, windows, journal)
            for phase in phases
        ]
        for series in all_series:
            progress.stage(series.name, series.tokens_left(-1))
            series.run(server, progress.advance)
            require_plausible(series.full_loss(), job.model.identity.vocab_size)
    return all_series


def _plan(job: ProfileJob, mode: ProfiledMode) -> ProbePlan:
    top_k, settings = job.model.identity.top_k, job.settings
    steps = HALF_SLOTS if mode == "threshold" else 1
    measured = settings.measured or default_measured(top_k, steps)
    return make_plan(
        len(job.model.layer_ids), top_k, settings.context, measured, settings.target_quota
    )


def _thinned(job: ProfileJob, plan: ProbePlan, phase: Phase) -> ProbePlan:
    if phase == "decode" or job.settings.measured is not None:
        return plan
    return plan.at_counts(default_measured_of_prefill(job.model.identity.top_k))


def _record_saliency(
    job: ProfileJob,
    server: ProfiledServer,
    plan: ProbePlan,
    windows: Sequence[Window],
    progress: Progress,
) -> None:
    """Have the engine record the saliency on the full model, and rank by it from then on."""
    progress.stage("saliency", sum(len(w.prefix) + len(w.continuation) for w in windows))
    server.set_probe(plan.full_row)
    run_whole(server, windows, job.settings.chunk_windows, progress.advance)
    server.set_probe(0)


def _known_saliency(job: ProfileJob, journal: ProfileJournal) -> npt.NDArray[np.float64] | None:
    """Return (L, E) saliency if this profile has measured it."""
    if journal.pinned("saliency") is None:
        return None
    path = job.folder / SALIENCY_FILE
    if not path.exists():
        raise ConfigurationError(
            f"{path} is gone, by which this profile has ranked so far. Put it back, or delete "
            f"{job.folder} and profile again."
        )
    sums = read_npz(path, "sums of saliency")
    return saliency_of(sums["sums"], sums["counts"])


def run_whole(
    server: ProfiledServer,
    windows: Sequence[Window],
    chunk_windows: int,
    advance: Callable[[int, int], None] = lambda _tokens, _left: None,
) -> int:
    """Forward whole windows, no state of which is in the cache; return the tokens it took."""
    whole = [Window((*w.prefix, *w.continuation), ()) for w in windows]
    server.flush()
    total = 0
    for start in range(0, len(whole), chunk_windows):
        tokens = server.prefill(whole[start : start + chunk_windows])
        total += tokens
        advance(tokens, sum(len(w.prefix) for w in whole[start + chunk_windows :]))
    return total


def _assembled(
    job: ProfileJob, all_series: Sequence[Series], saliency: npt.NDArray[np.float64] | None
) -> Profile:
    measured = {series.name: _matrix(series, job.model.layer_ids) for series in all_series}
    settings, identity = job.settings, job.model.identity
    length = settings.prefix_tokens + settings.continuation_tokens
    naive = len(job.model.layer_ids) * identity.top_k * settings.windows * length
    cost = Cost(sum(s.forward_tokens() for s in all_series), naive * len(all_series))
    halves = measured.get("threshold:decode")
    prefill_halves = measured.get("threshold:prefill")
    whole = slice(None, None, HALF_SLOTS)
    decode = _first(
        measured.get("layer:decode"),
        None if halves is None else halves[:, whole],
        measured.get("union:decode"),
        measured.get("layer:prefill"),
        None if prefill_halves is None else prefill_halves[:, whole],
    )
    provenance = job.settings.identity(job.model, job.model_id, "\f".join(job.texts))
    sensitivities = Sensitivities(
        sensitivity=decode,
        prefill_sensitivity=measured.get("layer:prefill"),
        union_sensitivity=measured.get("union:decode"),
        threshold_sensitivity=halves,
        prefill_threshold_sensitivity=prefill_halves,
        saliency=saliency,
        model=ProfiledModel(
            job.model_id, identity.fingerprint(), identity.num_experts, job.model.layer_ids
        ),
        provenance={
            **provenance,
            "made_by": "sglang-alloc profile",
            "modes": list(settings.modes),
            "windows_measured": {s.name: _windows_measured(s) for s in all_series},
            "forward_tokens": cost.forward_tokens,
            "naive_forward_tokens": cost.naive_tokens,
        },
    )
    return Profile(sensitivities, cost)


def _lexi(job: ProfileJob, progress: Progress) -> Profile:
    """Read what the engine records of each layer on Gaussian input when it starts; no text."""
    identity = job.model.identity
    plan = make_plan(len(job.model.layer_ids), identity.top_k, "isolated", (1,))
    path = job.folder / LEXI_FILE
    path.unlink(missing_ok=True)
    with serving(job, plan, Probe("layer", "lexi"), None, progress):
        progress.stage("lexi", 1)
    deviations = read_npz(path, "deviations")["deviations"]
    provenance = {
        "made_by": "sglang-alloc profile",
        "context": "lexi",
        "unit": "mean norm of the change of a layer's output, not nats",
        "weights_sha256": weights_digest(job.model.path),
    }
    model = ProfiledModel(
        job.model_id, identity.fingerprint(), identity.num_experts, job.model.layer_ids
    )
    found = Sensitivities(sensitivity=deviations, model=model, provenance=provenance)
    return Profile(found, Cost(0, deviations.size))


def _first(*candidates: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
    return next(matrix for matrix in candidates if matrix is not None)


def _matrix(series: Series, layer_ids: tuple[int, ...]) -> npt.NDArray[np.float64]:
    if series.phase == "decode":
        _require_routing(series, layer_ids)
    steps = HALF_SLOTS if series.name.startswith("threshold") else 1
    return sensitivity_of(series.plan, series.losses(), steps)


def _require_routing(series: Series, layer_ids: tuple[int, ...]) -> None:
    """Raise `ConfigurationError` for a layer whose smallest quota changes no loss at all."""
    for layer, cells in zip(layer_ids, series.plan.cells, strict=True):
        reference = series.increases(cells[-1])
        smallest = series.increases(cells[0])
        if np.array_equal(smallest, reference[: len(smallest)]):
            raise ConfigurationError(
                f"Keeping {series.plan.measured[0]:g} experts instead of "
                f"{series.plan.measured[-1]:g} in MoE layer {layer} changed no loss of any window: "
                "no token is routed there, or its experts are all the same. A budget would save "
                "nothing in that layer; leave it out of the model or do not serve this one."
            )


def _windows_measured(series: Series) -> Mapping[str, float]:
    counts = [len(series.increases(probe)) for probe in series.plan.probes]
    return {"fewest": min(counts), "mean": float(np.mean(counts)), "most": max(counts)}


def work_folder(output: Path) -> Path:
    """Return where the profile that becomes `output` keeps its journal and its server's log."""
    return output.with_name(output.name + ".profile")
