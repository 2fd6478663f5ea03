"""Control story, from start to stop: `sglang-alloc-controller run`."""

import logging
import os
import sys
import time
from importlib.resources import files
from pathlib import Path

import structlog

from sglang_alloc.errors import AllocError, ConfigurationError, TableInUseError
from sglang_alloc.shared_table import SharedTable
from sglang_alloc_controller.bucket_edges import missing_edges
from sglang_alloc_controller.config_follower import ConfigFollower
from sglang_alloc_controller.control_api import orders
from sglang_alloc_controller.decision_log import DecisionLog
from sglang_alloc_controller.http_permit import Permit
from sglang_alloc_controller.kill_switch import KillSwitch
from sglang_alloc_controller.log_output import LogOutput
from sglang_alloc_controller.loop import ControlLoop, Surroundings
from sglang_alloc_controller.metrics_server import (
    HTML_TYPE,
    JSON_TYPE,
    METRICS_TYPE,
    Answer,
    Health,
    MetricsServer,
    Page,
    Routes,
)
from sglang_alloc_controller.own_metrics import OwnMetrics
from sglang_alloc_controller.page_history import PageHistory
from sglang_alloc_controller.quality_bounds import NO_COST_MODEL, budget_ranges
from sglang_alloc_controller.samples import SourceError
from sglang_alloc_controller.settings import Settings, load_settings
from sglang_alloc_controller.shown_url import shown_url
from sglang_alloc_controller.source import open_source
from sglang_alloc_controller.source_poller import SourcePoller
from sglang_alloc_controller.stop_signal import StopSignal
from sglang_alloc_controller.table_link import TableLink

# A loop that has not ticked for this many ticks, and at least this long, is stuck.
_STUCK_TICKS = 10
_STUCK_SECONDS = 5.0
_POLLER_STOP_SECONDS = 0.2
_NANOSECONDS = 1_000_000_000
_log = structlog.get_logger("sglang_alloc_controller")


def run_with_retries(config: Path, retry_seconds: float) -> None:
    """As `run`, but a refusal is logged and tried again, until SIGTERM or SIGINT.

    For a container of a pod: its end would make the pod unready, and a server that can do without
    a controller would get no more requests.
    """
    _configure_logging()
    stop = StopSignal()
    while True:
        try:
            run(config, load_settings(config), stop)
            return
        except AllocError as error:
            _log.error("refused", problem=str(error), next_try_seconds=retry_seconds)
        if stop.sleep(retry_seconds):
            return


def run(config: Path, settings: Settings, stop: StopSignal | None = None) -> None:
    """Control until SIGTERM or SIGINT, then leave the server at full quality.

    `settings` were read from `config`, which is read again when it changes. `stop` has taken the
    signals; None: they are taken here.

    Raises:
        ConfigurationError: a setting does not fit the table or the server, or a port or file
            cannot be used.
        SharedTableError: there is no usable shared table, or another process writes it.
    """
    log_output = _configure_logging()
    follower = ConfigFollower(config, settings)
    stop = stop or StopSignal()
    stop.call_on_hangup(follower.ask_later)
    permit = Permit(settings.http.host, settings.control, os.environ)
    _refuse_missing_edges(settings)
    link = TableLink(Path(settings.table), lambda table: _accept(settings, table))
    try:
        _control(settings, link, follower, permit, stop, log_output=log_output)
    except TableInUseError:
        link.close()
        raise
    except BaseException:
        link.leave_at_full_quality()
        raise
    override = link.leave_at_full_quality()
    if override is not None:
        _log.warning(
            "override_stays",
            actor=override.actor,
            prefill=override.prefill_budget,
            decode=override.decode_budget,
            seconds_left=(override.deadline_ns - time.monotonic_ns()) // _NANOSECONDS,
            hint="`sglang-alloc set --clear` ends it",
        )
    _log.info("stopped", left_at="full quality")


def _control(
    settings: Settings,
    link: TableLink,
    follower: ConfigFollower,
    permit: Permit,
    stop: StopSignal,
    *,
    log_output: LogOutput,
) -> None:
    metrics = OwnMetrics(
        settings.mode, settings.slo, settings.quality, lambda: log_output.lost_lines
    )
    decision_log = DecisionLog(settings.decision_log, metrics.count_log_error)
    poller = SourcePoller(
        open_source(settings.source, time.monotonic), settings.source.poll_seconds
    )
    kill_switch = KillSwitch(_kill_path(settings), os.environ)
    history = PageHistory(lambda: loop.settings)
    around = Surroundings(
        poller.latest,
        time.monotonic_ns,
        stop.sleep,
        kill_switch.cause,
        follower.follow,
        history.add,
    )
    loop = ControlLoop(settings, link, metrics, decision_log, around)
    commands = orders(kill_switch, lambda: link.table, follower.ask, time.monotonic_ns)
    routes = Routes(_pages(loop, metrics, history), commands, permit.refusal)
    server = MetricsServer(settings.http, routes)
    server.start()
    poller.start()
    _log.info(
        "started",
        table=settings.table,
        model=link.table.model_id,
        mode=settings.mode,
        source=shown_url(settings.source.url),
        metrics=f"http://{settings.http.host}:{server.port}/metrics",
        page=f"http://{settings.http.host}:{server.port}/",
        kill_switch=str(kill_switch.path),
        prefill=link.selector().prefill_budget,
        decode=link.selector().decode_budget,
    )
    if settings.quality.cost_model is None and settings.mode != "fixed":
        _log.info("no_cost_model", meaning=NO_COST_MODEL)
    try:
        loop.run()
    finally:
        poller.stop(_POLLER_STOP_SECONDS)
        server.stop()
        decision_log.close()


def _pages(loop: ControlLoop, metrics: OwnMetrics, history: PageHistory) -> dict[str, Page]:
    html = files(__package__).joinpath("live_page.html").read_bytes()
    return {
        "/": lambda query: Answer(200, HTML_TYPE, html),
        "/history.json": lambda query: Answer(
            200, JSON_TYPE, history.answer(query.get("span", "minutes"))
        ),
        "/metrics": lambda query: Answer(200, METRICS_TYPE, metrics.text()),
        "/livez": lambda query: _live(loop).answer(),
        "/readyz": lambda query: _ready(loop).answer(),
    }


def _kill_path(settings: Settings) -> Path:
    return Path(settings.kill_switch.path or f"{settings.table}.kill")


def _accept(settings: Settings, table: SharedTable) -> None:
    budget_ranges(table, settings)


def _refuse_missing_edges(settings: Settings) -> None:
    """Refuse an SLO that the server cannot measure; wait for a server that is not there yet."""
    source = open_source(settings.source, time.monotonic)
    try:
        sentences = missing_edges(source.read(), settings.slo)
    except SourceError as error:
        _log.warning("source_not_there_yet", problem=str(error))
        return
    finally:
        source.close()
    if sentences:
        raise ConfigurationError(" ".join(sentences))


def _live(loop: ControlLoop) -> Health:
    age_seconds = time.monotonic() - loop.ticked_at_seconds
    limit_seconds = max(_STUCK_SECONDS, _STUCK_TICKS * loop.settings.tick_seconds)
    if age_seconds <= limit_seconds:
        return Health(True, f"The last tick was {age_seconds:.1f} s ago.")
    return Health(False, f"The last good tick was {age_seconds:.1f} s ago; see the log.")


def _ready(loop: ControlLoop) -> Health:
    """Tell whether control has begun; a server that is away is no reason to be unready."""
    ticked = loop.ticked_at_seconds > float("-inf")
    return Health(ticked, f"The input is {loop.input_state.value}.")


def _configure_logging() -> LogOutput:
    """Log to standard error: for people on a terminal, as JSON lines elsewhere."""
    on_terminal, output = sys.stderr.isatty(), LogOutput(sys.stderr.fileno())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *names: output,
    )
    return output
