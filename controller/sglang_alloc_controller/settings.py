"""Control story, before the first step: the settings, each with its unit, default and reason."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, ValidationError, field_validator, model_validator

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.samples import PHASES
from sglang_alloc_controller.settings_section import (
    Budget,
    Positive,
    Seconds,
    SecondsOrZero,
    Section,
    Share,
)
from sglang_alloc_controller.settings_yaml import read_mapping


class SourceSettings(Section):
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


class SloSettings(Section):
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


class QualitySettings(Section):
    """How much quality may be given up at most, and at least."""

    max_predicted_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Nats per token above the full model that the table may predict; it becomes the smallest
    budget, for each phase by its own prediction, so that both at their floors may lose up to twice
    as much. null: no such bound."""
    cost_model: str | None = None
    """CSV of step times by budget, as `sglang-alloc bench` writes it. With it the law uses only
    budgets that are faster than every larger one, and lowers first what saves most time per
    predicted loss. null: all budgets, prefill first, and many more changes an hour."""
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
        for phase in PHASES:
            floor = getattr(self, f"{phase}_floor_budget")
            ceiling = getattr(self, f"{phase}_ceiling_budget")
            if floor is not None and ceiling is not None and floor > ceiling:
                raise ValueError(
                    f"{phase}_floor_budget is {floor}, which is above {phase}_ceiling_budget "
                    f"({ceiling}); lower the floor or raise the ceiling"
                )
        return self


class FixedSettings(Section):
    """The budgets of `mode: fixed`, which opens the loop."""

    prefill_budget: Budget
    """Activations per token over all MoE layers."""
    decode_budget: Budget
    """Activations per token over all MoE layers."""


class FreshnessSettings(Section):
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


class HttpSettings(Section):
    """Where the controller serves its own /metrics, /livez and /readyz."""

    host: str = "127.0.0.1"
    """Loopback unless you say otherwise; 0.0.0.0 in a pod that is scraped."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 9464
    """The usual port of Prometheus exporters; 0 takes a free one and logs it."""


class ControlSettings(Section):
    """The endpoints that change something: POST /killswitch, /override and /reload on http.port."""

    token_file: str | None = None
    """File with the token that they require, 16 characters or more, read at each request. The
    environment variable SGLANG_ALLOC_CONTROL_TOKEN does the same. Without a token they answer only
    while http.host is loopback."""


class KillSwitchSettings(Section):
    """The switch that ends all trading of quality at once."""

    path: str | None = None
    """While this file is there, full quality is in force. null: the table's path and .kill."""


class DecisionLogSettings(Section):
    """The record of what was decided and why, as JSON lines."""

    path: str | None = None
    """File to append to; null: no log."""
    every_tick: bool = False
    """true: a line each tick, for replay. false: when a budget, the state or the actor changes."""
    max_bytes: Annotated[int, Field(ge=4096)] = 10_000_000
    """Size from which the file is rotated."""
    keep_files: Annotated[int, Field(ge=0, le=100)] = 3
    """Rotated files that are kept."""


class Settings(Section):
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
