"""Control story, before the first step: the constants of the control law, each with its reason."""

from typing import Annotated

from pydantic import Field, model_validator

from sglang_alloc_controller.settings_section import (
    Positive,
    Seconds,
    SecondsOrZero,
    Section,
    Share,
)


class LawSettings(Section):
    """Constants of the control law; `control_law` says what each does.

    Steps are shares of the range between floor and ceiling, so that they mean the same in a
    table of 40 budgets and in one of 1500.
    """

    window_seconds: Seconds = 10.0
    """Span of the samples that are judged: some tens of requests on a busy server."""
    long_window_seconds: Seconds = 120.0
    """Span over which a mild violation must show, and over which the load is taken: long enough
    for arrivals that come in clumps to even out. At 30 s the budgets never came to rest."""
    window_max_seconds: Seconds = 180.0
    """Longest span, used while a shorter one holds fewer than min_samples."""
    min_samples: Annotated[int, Field(ge=1)] = 6
    """Fewer events than this decide nothing. The confidence term guards small counts as well."""
    confidence_sigmas: SecondsOrZero = 2.0
    """Standard deviations by which misses must exceed the allowance: 2 is about one false alarm
    in forty looks."""
    degrade_burn_ratio: Positive = 1.0
    """Burn rate (misses over allowed misses) above which quality is given up: 1 is the SLO."""
    restore_burn_ratio: SecondsOrZero = 0.8
    """Burn rate under which quality may come back; between the two lies the dead band."""
    severe_burn_ratio: Positive = 4.0
    """Burn rate from which the short window is acted on, full or not: speed matters more than
    certainty then, unless the long window is within the SLO and the queue is gone. Below it the
    long window must show the violation."""
    max_burn_ratio: Positive = 10.0
    """Clamp of the burn rate before smoothing, so that an outage is not remembered for long."""
    smoothing_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the newest burn rate in the smoothed one; 1 switches smoothing off."""
    degrade_gain: Positive = 0.06
    """Share of the range given up per decision and unit of excess burn."""
    degrade_step_max: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Largest share of the range given up at once: the floor is four decisions away."""
    degrade_hold_seconds: Seconds = 3.0
    """Shortest time between a change and giving up more."""
    dead_time_seconds: SecondsOrZero = 1.0
    """Samples up to this long after a change are ignored: they began before it."""
    restore_step_max: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Largest share of the range given back at once: slower than giving up."""
    restore_step_min: Annotated[float, Field(ge=0, le=1)] = 0.04
    """Smallest share of the range worth a change; less room than this is none."""
    restore_hold_seconds: Seconds = 6.0
    """Shortest time between a change of either phase and giving back."""
    restore_after_degrade_seconds: Seconds = 300.0
    """How long a load is believed to be too much for a budget that was lowered under it. A load
    that falls to relief_ratio ends this wait."""
    restore_margin_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """A step back is taken if the latency it predicts stays under this share of the SLO."""
    latency_growth_prior: Positive = 1.0
    """First guess of the relative latency growth from floor to ceiling (1: it doubles); learned
    from then on."""
    probe_seconds: Seconds = 20.0
    """After this long within the SLO a step back is tried although the prediction forbids it:
    coarse buckets overestimate."""
    trial_seconds: Seconds = 120.0
    """A violation this soon after a step back is blamed on it, and a budget that failed before is
    tried at most this often."""
    backoff_seconds: Seconds = 600.0
    """How long a load is believed to be too much for a step back that had to be taken back."""
    backoff_factor: Annotated[float, Field(ge=1)] = 2.0
    """Growth of either wait each time that the same budget fails again."""
    backoff_max_seconds: Seconds = 3600.0
    """Longest such wait: one try per hour under constant load."""
    relief_ratio: Share = 0.9
    """A wait ends early when the load is surely below this share of the one that was too much."""
    load_change_nats: Positive = 6.0
    """Evidence from which a young load counts as another one: logarithm of a likelihood ratio."""
    load_critical_prior: Positive = 0.85
    """First guess of the utilisation at which the SLO just holds; learned from then on. This and
    the slope fit 137 simulated pairs of constant loads and budgets to 14 % of the late answers."""
    load_critical_spread: Positive = 0.02
    """Standard deviation of that guess."""
    load_slope: Positive = 20.0
    """How steeply misses grow with the utilisation: by a factor of e for each 1/load_slope."""
    load_stray_ratio: Share = 0.05
    """Share of the allowed misses that have nothing to do with the load: very long prompts."""
    load_dispersion: Annotated[float, Field(ge=1)] = 80.0
    """Misses that come together: at 3 % of late answers their number in an hour differs by a third
    from one hour to another of the same load, as that of 900 answers in clumps of 80 would."""
    load_memory_seconds: Seconds = 1800.0
    """How long what was learned of the critical utilisation counts."""
    load_free_ratio: Share = 0.06
    """Share of the allowed misses up to which late answers cost nothing. Nearly all of them count:
    those that a cheap budget would have spared then pay for the next clump."""
    load_miss_price_nats: Positive = 0.4
    """What a miss is worth in predicted loss: a per cent of late requests weighs 0.004 nats."""
    load_violation_price_nats: Positive = 0.5
    """What a likely miss beyond the objective is worth besides."""
    load_worth_nats: Positive = 0.002
    """A change must be worth so much, loss and price of late answers together."""
    load_wait_factor: Annotated[float, Field(ge=1)] = 3.0
    """How many times longer than at the last change a load must be known for the next one."""
    load_settle_seconds: SecondsOrZero = 10.0
    """Time after a change before late answers are charged to the new budgets."""
    load_drain_seconds: Seconds = 10.0
    """Time in which waiting requests beyond the queue's SLO shall be worked off."""
    load_backlog_ratio: Positive = 10.0
    """Largest such queue that counts, in multiples of its SLO."""
    calm_budgets: bool = True
    """Whether steps that leave no request waiting while few enough run may have larger budgets than
    the others."""
    calm_kept_ratio: Share = 0.7
    """Without a cost model: how much of what the budgets give up is kept in steps that leave no
    request waiting. All of it would keep the SLO less well, by one or two points."""
    calm_running_ratio: Positive = 0.9375
    """Share of the most running requests seen from which on a step is not calm: a server that is
    nearly full is where waiting begins. Less of it costs quality, more of it late answers (0.875
    and 1 were tried, on two CPU cores and on an H200's step times)."""
    levels_max: Annotated[int, Field(ge=2)] = 12
    """Budgets of each phase that are used where quality.cost_model tells their step times: each
    change takes a window to judge, and a finer choice than this saves little loss."""
    cost_batch: Annotated[int, Field(ge=1)] = 8
    """Running requests at which the cost model is asked for the decode budgets' step times."""
    cost_prefill_tokens: Annotated[int, Field(ge=1)] = 2048
    """Prompt tokens of a step at which it is asked for those of the prefill budgets."""
    queue_decode_ratio: Positive = 2.0
    """Queue length, in multiples of its SLO, from which the decode budget is lowered too."""
    queue_restore_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Nothing is given back while the queue is above this multiple of its SLO."""
    drain_patience_seconds: Seconds = 10.0
    """How long after a change a shrinking queue is waited for before giving up more."""
    idle_ramp_seconds: Seconds = 10.0
    """Time of the way from floor to ceiling on an idle server: nobody is there to be slowed."""
    infeasible_after_seconds: Seconds = 30.0
    """At the floor and still violating for this long: the SLO is reported as infeasible."""

    @model_validator(mode="after")
    def _possible(self) -> "LawSettings":
        below = (
            ("restore_burn_ratio", "degrade_burn_ratio", "the dead band between them is empty"),
            ("degrade_burn_ratio", "severe_burn_ratio", "every violation would count as severe"),
            ("severe_burn_ratio", "max_burn_ratio", "the clamp would hide it"),
        )
        for low, high, why in below:
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low} is {getattr(self, low)} and must be below {high} "
                    f"({getattr(self, high)}): {why}"
                )
        at_most = (
            ("window_seconds", "window_max_seconds"),
            ("backoff_seconds", "backoff_max_seconds"),
            ("window_seconds", "long_window_seconds"),
            ("long_window_seconds", "window_max_seconds"),
            ("degrade_hold_seconds", "restore_hold_seconds"),
            ("restore_hold_seconds", "restore_after_degrade_seconds"),
            ("restore_step_min", "restore_step_max"),
        )
        for low, high in at_most:
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low} is {getattr(self, low)} and must be at most {high} "
                    f"({getattr(self, high)})"
                )
        return self
