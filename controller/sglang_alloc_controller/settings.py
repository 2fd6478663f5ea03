"""Control story, before the first step: the settings, each with its unit, default and reason."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.settings_yaml import read_mapping

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Budget = Annotated[int, Field(ge=1, le=65_535)]


class _Section(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class SourceSettings(_Section):
    """Where the latencies are read."""

    kind: Literal["sglang", "prometheus"] = "sglang"
    """sglang: the server's own /metrics, the freshest. prometheus: a Prometheus server's API, when
    the controller cannot reach the server or must see several replicas as one."""
    url: str = "http://127.0.0.1:30000"
    """Base address, without /metrics or /api. The default is SGLang's own port."""
    poll_seconds: Seconds = 1.0
    """Time between two readings. SGLang's queue gauge moves about this often."""
    timeout_seconds: Seconds = 2.0
    """A whole reading must be in by then; a healthy server answers in milliseconds."""
    streaming_only: bool = True
    """Leave out requests that do not stream: SGLang flushes them every 50 tokens, so their
    time to first token reads up to 50 tokens too high."""
    model_name: str | None = None
    """Count only this model_name; null counts every model of the server."""
    loads: bool = True
    """sglang only: read /v1/loads too. Its queue is of the moment, and it tells the time of each
    rank's last step, so that a scheduler that hangs behind a healthy HTTP server is stale."""
    priorities: list[str] | None = None
    """Count only requests of these priorities (--enable-priority-scheduling), for the latencies and
    for the queue, so that waiting batch work costs no quality. null counts all."""
    selector: str = ""
    """prometheus only: PromQL label matchers such as job="sglang",namespace="prod"."""
    lookback_seconds: Seconds = 60.0
    """prometheus only: how far back to look for the last scrape; at least two scrape intervals."""

    @field_validator("url")
    @classmethod
    def _http_url(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")) or not url.split("://", 1)[1].strip("/"):
            raise ValueError("must be http://HOST:PORT or https://HOST:PORT")
        return url.rstrip("/")

    @field_validator("selector")
    @classmethod
    def _matchers_only(cls, selector: str) -> str:
        if any(mark in selector for mark in "{}[]"):
            raise ValueError('must be matchers without braces, such as job="sglang"')
        return selector.strip().strip(",")


class SloSettings(_Section):
    """What is promised. The two latencies have no default, because they are yours to choose."""

    ttft_seconds: Seconds | None
    """Time to first token. It must be one of SGLang's --bucket-time-to-first-token edges. null: no
    such promise."""
    itl_seconds: Seconds | None
    """Inter-token latency. It must be one of SGLang's --bucket-inter-token-latency edges. null: no
    such promise."""
    objective_ratio: Share = 0.95
    """Share of the events that must be within the latency: a p95 promise."""
    queue_requests: Positive = 4.0
    """Waiting requests above which the server counts as overloaded. The queue is the leading
    signal: a request shows in the TTFT histogram only after it has waited."""


class QualitySettings(_Section):
    """How much quality may be given up at most, and at least."""

    max_predicted_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Nats per token above the full model that the table may predict; it becomes the smallest
    budget, for each phase by its own prediction. null: no such bound."""
    cost_model: str | None = None
    """CSV of step times by budget, as `python -m sglang_alloc.bench` writes it. With it the law
    uses only budgets that are faster than every larger one, and lowers first what saves most time
    per predicted loss. null: all budgets, prefill first."""
    prefill_floor_budget: Budget | None = None
    """Smallest prefill budget, activations per token over all MoE layers; null: the table's."""
    decode_floor_budget: Budget | None = None
    """Smallest decode budget; null: the table's."""
    prefill_ceiling_budget: Budget | None = None
    """Largest prefill budget; null: full quality."""
    decode_ceiling_budget: Budget | None = None
    """Largest decode budget; null: full quality."""
    below_full_minutes: Positive | None = None
    """Minutes below full quality that are agreed within the window: the error budget of quality. It
    is reported and alerted on, and stops nothing. null: no such agreement."""
    below_full_window_hours: Annotated[float, Field(gt=0, le=744)] = 24.0
    """Length of that rolling window; what happened before this process started is not in it."""

    @model_validator(mode="after")
    def _floor_below_ceiling(self) -> "QualitySettings":
        for phase in ("prefill", "decode"):
            floor = getattr(self, f"{phase}_floor_budget")
            ceiling = getattr(self, f"{phase}_ceiling_budget")
            if floor is not None and ceiling is not None and floor > ceiling:
                raise ValueError(
                    f"{phase}_floor_budget is {floor}, which is above {phase}_ceiling_budget "
                    f"({ceiling}); lower the floor or raise the ceiling"
                )
        return self


class FixedSettings(_Section):
    """The budgets of `mode: fixed`, which opens the loop."""

    prefill_budget: Budget
    """Activations per token over all MoE layers."""
    decode_budget: Budget
    """Activations per token over all MoE layers."""


class LawSettings(_Section):
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
    load_critical_prior: Positive = 0.82
    """First guess of the utilisation at which the SLO just holds; learned from then on."""
    load_critical_spread: Positive = 0.06
    """Standard deviation of that guess."""
    load_slope: Positive = 14.0
    """How steeply misses grow with the utilisation: by a factor of e for each 1/load_slope."""
    load_stray_ratio: Share = 0.05
    """Share of the allowed misses that have nothing to do with the load: very long prompts."""
    load_dispersion: Annotated[float, Field(ge=1)] = 16.0
    """Misses that come together: a late answer is seldom alone."""
    load_memory_seconds: Seconds = 1800.0
    """How long what was learned of the critical utilisation counts."""
    load_free_ratio: Share = 0.5
    """Share of the allowed misses up to which late answers cost nothing."""
    load_miss_price_nats: Positive = 0.55
    """What a miss is worth in predicted loss: a per cent of late requests weighs 0.0055 nats."""
    load_violation_price_nats: Positive = 1.0
    """What a miss beyond the objective is worth besides."""
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


class FreshnessSettings(_Section):
    """When a reading is too old, and what happens then."""

    stale_after_seconds: Seconds = 5.0
    """Age of the newest reading from which the input is STALE: several polls missed."""
    hold_seconds: SecondsOrZero = 15.0
    """How long the budgets are held then, over a short hiccup."""
    ramp_seconds: Seconds = 60.0
    """Time of the way from floor to ceiling then: nobody sees whether the load allows it."""
    then: Literal["full", "hold"] = "full"
    """full: ramp to full quality afterwards, the fail-safe. hold: keep the budgets for ever."""
    idle_after_seconds: Seconds = 5.0
    """Time without a running or waiting request and without an event from which it is IDLE."""
    warmup_seconds: SecondsOrZero = 20.0
    """Time after a start of the engine whose latencies are ignored: caches and kernels warm up."""


class HttpSettings(_Section):
    """Where the controller serves its own /metrics, /livez and /readyz."""

    host: str = "127.0.0.1"
    """Loopback unless you say otherwise; 0.0.0.0 in a pod that is scraped."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 9464
    """The usual port of Prometheus exporters; 0 takes a free one and logs it."""


class ControlSettings(_Section):
    """The endpoints that change something: POST /killswitch, /override and /reload on http.port."""

    token_file: str | None = None
    """File with the token that they require, 16 characters or more, read at each request. The
    environment variable SGLANG_ALLOC_CONTROL_TOKEN does the same. Without a token they answer only
    while http.host is loopback."""


class KillSwitchSettings(_Section):
    """The switch that ends all trading of quality at once."""

    path: str | None = None
    """While this file is there, full quality is in force. null: the table's path and .kill."""


class DecisionLogSettings(_Section):
    """The record of what was decided and why, as JSON lines."""

    path: str | None = None
    """File to append to; null: no log."""
    every_tick: bool = False
    """true: a line each tick, for replay. false: when a budget, the state or the actor changes."""
    max_bytes: Annotated[int, Field(ge=4096)] = 10_000_000
    """Size from which the file is rotated."""
    keep_files: Annotated[int, Field(ge=0, le=100)] = 3
    """Rotated files that are kept."""


class Settings(_Section):
    """The whole configuration file of the controller."""

    table: str
    """Path of the shared table that `sglang-alloc publish` wrote and the server uses."""
    mode: Literal["control", "shadow", "fixed"] = "control"
    """control: move the budgets. shadow: decide and report, but leave full quality in force.
    fixed: write the budgets under `fixed`."""
    tick_seconds: Annotated[float, Field(ge=0.05, le=1.0)] = 0.5
    """Time between two decisions and heartbeats; at most 1, so that workers never miss one."""
    source: SourceSettings = SourceSettings()
    slo: SloSettings
    quality: QualitySettings = QualitySettings()
    fixed: FixedSettings | None = None
    law: LawSettings = LawSettings()
    freshness: FreshnessSettings = FreshnessSettings()
    http: HttpSettings = HttpSettings()
    control: ControlSettings = ControlSettings()
    kill_switch: KillSwitchSettings = KillSwitchSettings()
    decision_log: DecisionLogSettings = DecisionLogSettings()

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.mode == "fixed" and self.fixed is None:
            raise ValueError("mode is fixed, which needs fixed.prefill_budget and decode_budget")
        if self.source.poll_seconds >= self.freshness.stale_after_seconds:
            raise ValueError(
                f"source.poll_seconds is {self.source.poll_seconds} and must be below "
                f"freshness.stale_after_seconds ({self.freshness.stale_after_seconds}): every "
                "reading would be stale before the next"
            )
        return self


def load_settings(path: Path) -> Settings:
    """Read and check the YAML file `path`.

    Raises:
        ConfigurationError: it cannot be read, or a value is unknown, malformed or impossible; one
            sentence for each says the key, what was found and what is allowed.
    """
    return parse_settings(read_mapping(path), path.name)


def parse_settings(content: dict[str, Any], name: str = "the configuration") -> Settings:
    """Check `content`, the configuration as a mapping; see `load_settings`."""
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        _refuse(name, error)


def json_schema() -> str:
    """Return the JSON schema of the configuration file, for editors and for CI."""
    return json.dumps(Settings.model_json_schema(), indent=2) + "\n"


def _refuse(name: str, error: ValidationError) -> NoReturn:
    sentences = [_sentence(detail) for detail in error.errors(include_url=False)]
    raise ConfigurationError(f"In {name}: " + " ".join(sentences)) from error


def _sentence(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{key} is not a setting; remove it or correct its spelling."
    if detail["type"] == "missing":
        return f"{key} is missing; it must be set."
    reason = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):
        return f"{key}: {reason}." if key else f"{reason}."
    if detail["type"] == "model_type" and detail["input"] is None:
        return f"{key} is empty; give it its settings or remove it."
    return f"{key} is {detail['input']!r}: it {reason}."
