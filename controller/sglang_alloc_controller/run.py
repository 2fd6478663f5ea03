"""Control story, from start to stop: `sglang-alloc-controller run`."""

import logging
import signal
import sys
import threading
import time
from pathlib import Path

import structlog

from sglang_alloc.errors import ConfigurationError, TableInUseError
from sglang_alloc.shared_table import SharedTable
from sglang_alloc_controller.bucket_edges import missing_edges
from sglang_alloc_controller.decision_log import DecisionLog
from sglang_alloc_controller.loop import ControlLoop, Surroundings
from sglang_alloc_controller.metrics_server import Health, MetricsServer
from sglang_alloc_controller.own_metrics import OwnMetrics
from sglang_alloc_controller.quality_bounds import budget_ranges
from sglang_alloc_controller.samples import SourceError
from sglang_alloc_controller.settings import Settings
from sglang_alloc_controller.source import open_source
from sglang_alloc_controller.source_poller import SourcePoller
from sglang_alloc_controller.table_link import TableLink

# A loop that has not ticked for this many ticks, and at least this long, is stuck.
_STUCK_TICKS = 10
_STUCK_SECONDS = 5.0
_POLLER_STOP_SECONDS = 0.2
_log = structlog.get_logger("sglang_alloc_controller")


def run(settings: Settings) -> None:
    """Control until SIGTERM or SIGINT, then leave the server at full quality.

    Raises:
        ConfigurationError: a setting does not fit the table or the server, or a port or file
            cannot be used.
        SharedTableError: there is no usable shared table, or another process writes it.
    """
    _configure_logging()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    _refuse_missing_edges(settings)
    link = TableLink(Path(settings.table), lambda table: _accept(settings, table))
    try:
        _control(settings, link, stopped)
    except TableInUseError:
        link.close()
        raise
    except BaseException:
        link.leave_at_full_quality()
        raise
    link.leave_at_full_quality()
    _log.info("stopped", left_at="full quality")


def _control(settings: Settings, link: TableLink, stopped: threading.Event) -> None:
    metrics = OwnMetrics(settings.mode, settings.slo)
    decision_log = DecisionLog(settings.decision_log, metrics.count_log_error)
    poller = SourcePoller(
        open_source(settings.source, time.monotonic), settings.source.poll_seconds
    )
    around = Surroundings(poller.latest, time.monotonic_ns, stopped.wait)
    loop = ControlLoop(settings, link, metrics, decision_log, around)
    server = MetricsServer(
        settings.http, metrics.text, lambda: _live(loop, settings), lambda: _ready(loop)
    )
    server.start()
    poller.start()
    _log.info(
        "started",
        table=settings.table,
        model=link.table.model_id,
        mode=settings.mode,
        source=settings.source.url,
        metrics=f"http://{settings.http.host}:{server.port}/metrics",
        prefill=link.selector().prefill_budget,
        decode=link.selector().decode_budget,
    )
    try:
        loop.run()
    finally:
        poller.stop(_POLLER_STOP_SECONDS)
        server.stop()
        decision_log.close()


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


def _live(loop: ControlLoop, settings: Settings) -> Health:
    age_seconds = time.monotonic() - loop.ticked_at_seconds
    limit_seconds = max(_STUCK_SECONDS, _STUCK_TICKS * settings.tick_seconds)
    if age_seconds <= limit_seconds:
        return Health(True, f"The last tick was {age_seconds:.1f} s ago.")
    return Health(False, f"The last good tick was {age_seconds:.1f} s ago; see the log.")


def _ready(loop: ControlLoop) -> Health:
    """Tell whether control has begun; a server that is away is no reason to be unready."""
    ticked = loop.ticked_at_seconds > float("-inf")
    return Health(ticked, f"The input is {loop.input_state.value}.")


def _configure_logging() -> None:
    """Log to standard error: for people on a terminal, as JSON lines elsewhere."""
    on_terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
