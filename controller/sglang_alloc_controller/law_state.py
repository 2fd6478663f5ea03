"""Control story, third step: what the law sees, remembers and decides. Pure data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.law_capacity import Levels
from sglang_alloc_controller.law_gain import Gain
from sglang_alloc_controller.law_load import Load
from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.load_history import LoadWindow
from sglang_alloc_controller.reading_history import Newest, Sample
from sglang_alloc_controller.samples import PHASES, InputState, Phase, Slo
from sglang_alloc_controller.settings import FreshnessSettings, SloSettings


class Reason(Enum):
    """Why a phase's budget is what it is; exported one-hot."""

    AT_CEILING = "at_ceiling"
    TTFT_SLO = "ttft_slo"
    ITL_SLO = "itl_slo"
    QUEUE_SLO = "queue_slo"
    DRAINING = "draining"
    AT_FLOOR = "at_floor"
    INFEASIBLE = "infeasible"
    HOLD = "hold"
    PREDICTED_OVERLOAD = "predicted_overload"
    DEADBAND = "deadband"
    TOO_FEW_SAMPLES = "too_few_samples"
    RESTORE = "restore"
    PROBE = "probe"
    RESTORE_TAKEN_BACK = "restore_taken_back"
    BACKOFF = "backoff"
    PREDICTED_VIOLATION = "predicted_violation"
    OTHER_PHASE_FIRST = "other_phase_first"
    IDLE = "idle"
    WARMUP = "warmup"
    STALE_HOLD = "stale_hold"
    STALE_RAMP = "stale_ramp"
    OVERRIDE = "override"
    FIXED = "fixed"
    KILL_SWITCH = "kill_switch"


class LawConstants(NamedTuple):
    """What the law is told once."""

    slo: SloSettings
    law: LawSettings
    freshness: FreshnessSettings
    ranges: Mapping[Phase, BudgetRange]


class Seen(NamedTuple):
    """What the law sees at one tick."""

    now_seconds: float
    input_state: InputState
    warming_up: bool
    samples: Mapping[Slo, Sample | None]
    """Of the short window."""
    long_samples: Mapping[Slo, Sample | None]
    """Of the long window."""
    event_rates: Mapping[Slo, float]
    """Events per second of each latency: the load."""
    queue_requests: float
    reading_at_seconds: float
    """When the newest reading was true; the same one is smoothed only once."""
    running_requests: float = 0.0
    load_windows: tuple[LoadWindow, ...] = ()
    """What arrived, over longer and longer windows; empty: the server does not tell."""
    dispersion: float = 1.0
    """Variance of the arrivals over their mean; 1: Poisson, or not known to be less."""
    newest: Newest | None = None
    """What happened since the reading before the newest one."""


class Failure(NamedTuple):
    """A load that was too much for a position, and until when that is believed."""

    position: float
    rate_per_second: float
    """Requests per second."""
    until_seconds: float
    wait_seconds: float
    """How long it was believed at first; the next failure of this position is believed longer."""


@dataclass(frozen=True)
class PhaseState:
    """What the law remembers of one phase; times are monotonic seconds."""

    position: float
    """0 is the floor, 1 the ceiling."""
    latency_growth: float
    """Learned relative growth of the mean latency from floor to ceiling."""
    changed_at_seconds: float = -math.inf
    queue_at_change: float = 0.0
    burn_ratio: float | None = None
    """Smoothed, clamped burn rate since the last change."""
    restored_at_seconds: float = -math.inf
    """Time of a step back that is still on trial."""
    position_before_restore: float = 1.0
    failures: tuple[Failure, ...] = ()
    """Loads that were too much, the newest last."""
    before_change: Sample | None = None
    """Sample just before the last change, until the growth has been learned from it."""
    step: float = 0.0
    """Signed size of the last change."""


class Evidence(NamedTuple):
    """What one reading says of how much the server carries."""

    at_seconds: float
    utilisation: float
    requests: float
    missed_ratio: float
    seconds: float


class ForwardState(NamedTuple):
    """What the law has learned of how much the server carries."""

    critical: float
    """Utilisation at which exactly the allowed share of events misses the SLOs."""
    precision: float
    """One over the variance of that belief."""
    batch: float
    """Most running requests ever seen."""
    learned_at_seconds: float = -math.inf
    load_since_seconds: float = -math.inf
    """Since when the load is what it is."""
    running: float = 8.0
    """Running requests, on the average of the last minute."""
    levels: Levels | None = None
    """Where the law left prefill and decode."""
    server_since_seconds: float = -math.inf
    """When the server was last seen to have become faster or slower."""
    alarm_at_seconds: float = -math.inf
    """When somebody else was last seen to have moved the budgets, or a queue surged."""
    draining: bool = False
    """Whether the last change was to work off a queue."""
    load: Load | None = None
    """The load at the newest reading."""
    chosen_for: Load | None = None
    """The load at the last change of the budgets."""
    before_per_second: float | None = None
    """Rate of the load before the present one."""
    pending: tuple[Evidence, ...] = ()
    """Evidence not learned from yet, the oldest first."""
    peaks: tuple[tuple[float, float], ...] = ()
    """(when it ended, requests per second) of loads that a lower one followed."""
    prefill_gain: Gain = Gain()
    decode_gain: Gain = Gain()
    """What smaller budgets save on this server, over what its bench says."""
    busy_share: float = 0.0
    """Share of the tokens in busy steps, at the newest reading, by the law's own figures."""
    reason: Reason = Reason.DEADBAND
    """Of the last decision."""


class Calm(NamedTuple):
    """What the law chose for calm steps (law_calm)."""

    levels: Levels
    running_requests: int
    """From so many running requests on a step is not calm."""
    changed_at_seconds: float = -math.inf


@dataclass(frozen=True)
class LawState:
    """What the law remembers."""

    phases: Mapping[Phase, PhaseState]
    queue_requests: float | None = None
    """Smoothed queue length."""
    smoothed_at_seconds: float = -math.inf
    stale_since_seconds: float | None = None
    saturated_since_seconds: float | None = None
    """Since when every phase is at its floor and an SLO is violated."""
    forward: ForwardState | None = None
    """None: nothing was learned yet."""
    calm: Calm | None = None
    """Chosen for the load beside the budgets; None: nothing was."""
    by_latencies: bool = False
    """Whether latencies moved the budgets last, although step times by budget are known."""


class Pressure(NamedTuple):
    """How badly an SLO asks a phase for speed."""

    excess: float
    """Burn rate above the allowed one; 0: no violation."""
    cause: Reason


class Decision(NamedTuple):
    """What one tick decided."""

    positions: Mapping[Phase, float]
    reasons: Mapping[Phase, Reason]
    excesses: Mapping[Phase, float]
    saturation_ratio: float
    """0: full quality. Up to 0.8: share of the range given up. 1: violating, and nothing more may
    be given up: at the floor, or somebody else decides. NaN: the input is stale."""
    calm_positions: Mapping[Phase, float] | None = None
    """Of calm steps; None: as all steps."""
    calm_running_requests: int = 0
    """From so many running requests on a step is not calm; counts with calm positions only."""


def step_time_ratios(state: LawState) -> dict[Phase, float | None]:
    """Return how long engine steps take over the cost model's times; None: nothing was learned."""
    belief = state.forward
    gains = (None, None) if belief is None else (belief.prefill_gain, belief.decode_gain)
    return {
        phase: None if gain is None or gain == Gain() else gain.line()[0]
        for phase, gain in zip(PHASES, gains, strict=True)
    }


def initial_state(
    positions: Mapping[Phase, float], law: LawSettings, now_seconds: float
) -> LawState:
    """Return the state of a controller that finds these positions in the selector at this time.

    They count as just chosen: nothing moves before there are samples of them.
    """
    growth = law.latency_growth_prior
    phases = {
        phase: PhaseState(position, growth, changed_at_seconds=now_seconds)
        for phase, position in positions.items()
    }
    return LawState(phases)


def changed_at_seconds(state: LawState) -> float:
    """Return when a budget was last changed, be it of calm steps only."""
    prefill, decode = state.phases["prefill"], state.phases["decode"]
    last = max(prefill.changed_at_seconds, decode.changed_at_seconds)
    return last if state.calm is None else max(last, state.calm.changed_at_seconds)


def has_step_times(constants: LawConstants) -> bool:
    """Tell whether a cost model says what a step takes, so that the law can look ahead."""
    return all(constants.ranges[phase].step_times for phase in PHASES)


def levels_of(state: LawState, constants: LawConstants) -> Levels:
    """Return the levels in force."""
    ranges, phases = constants.ranges, state.phases
    return Levels(
        ranges["prefill"].level(phases["prefill"].position),
        ranges["decode"].level(phases["decode"].position),
    )


def calm_levels_of(state: LawState, constants: LawConstants) -> Levels:
    """Return the levels of calm steps: those in force, unless the law chose larger ones."""
    levels = levels_of(state, constants)
    if state.calm is None:
        return levels
    calm = state.calm.levels
    return Levels(max(levels.prefill, calm.prefill), max(levels.decode, calm.decode))
