"""Demo, step 3: the real controller, configured for this run and stopped when the block ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sglang_alloc.demo.load_plan import Slo
from sglang_alloc.demo.observation import METRICS_EVERY_SECONDS
from sglang_alloc.server_runs.owned_process import OwnedProcess, owned_process
from sglang_alloc.server_runs.server_process import console_script, wait_until_ready

READY_TIMEOUT_SECONDS = 20.0
# Waits of minutes are shorter by five to twenty times than the defaults, those of seconds by up to
# four; steps are larger to match.
_QUICK_LAW = {
    "window_seconds": 5.0,
    "long_window_seconds": 15.0,
    "window_max_seconds": 20.0,
    "degrade_gain": 0.2,
    "degrade_step_max": 0.5,
    "degrade_hold_seconds": 2.0,
    "restore_hold_seconds": 3.0,
    "restore_step_max": 0.25,
    "restore_after_degrade_seconds": 30.0,
    "probe_seconds": 5.0,
    "trial_seconds": 15.0,
    "backoff_seconds": 30.0,
    "backoff_max_seconds": 120.0,
}


def controller_settings(
    *,
    table: Path,
    server_url: str,
    slo: Slo,
    floor_budget: int,
    decision_log: Path,
    port: int,
    max_predicted_loss: float | None = None,
) -> dict[str, Any]:
    """Return the controller's configuration for the demo.

    The law's constants are its defaults except those that hold times and steps: the demo's burst
    lasts half a minute, not the quarter of an hour that the defaults are made for.
    Neither budget goes below `floor_budget`, nor where the tables predict more than
    `max_predicted_loss`, in nats per token.
    """
    return {
        "table": str(table),
        "source": {"kind": "sglang", "url": server_url, "poll_seconds": METRICS_EVERY_SECONDS},
        "slo": {
            "ttft_seconds": slo.ttft_seconds,
            "itl_seconds": slo.itl_seconds,
            "objective_ratio": 0.95,
            "queue_requests": 2.0,
        },
        "quality": {
            "prefill_floor_budget": floor_budget,
            "decode_floor_budget": floor_budget,
            "max_predicted_loss": max_predicted_loss,
        },
        "law": dict(_QUICK_LAW),
        "freshness": {"warmup_seconds": 0.0},
        "http": {"host": "127.0.0.1", "port": port},
        "decision_log": {"path": str(decision_log), "every_tick": True},
    }


@contextlib.contextmanager
def controller(
    settings: dict[str, Any], *, config_path: Path, log_path: Path
) -> Iterator[OwnedProcess]:
    """Write `settings` to `config_path` and run the controller until the block ends.

    Raises ProcessDiedError or NotReadyError, both with the last lines of `log_path`.
    """
    config_path.parent.mkdir(parents=True, exist_ok=True)
    config_path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    command = [console_script("sglang-alloc-controller"), "run", "--config", str(config_path)]
    url = f"http://127.0.0.1:{settings['http']['port']}/livez"
    with owned_process("the controller", command, log_path=log_path) as process:
        wait_until_ready(process, url, READY_TIMEOUT_SECONDS)
        yield process
