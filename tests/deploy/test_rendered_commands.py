"""What the pod's containers are told to run really runs, in the order in which the pod runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chart_render import VALUE_SETS, Manifest, container, only, render
from waiting import wait_until

from sglang_alloc.budget_tables import BudgetTables, save_budget_tables
from sglang_alloc.shared_table import SharedTable
from sglang_alloc_controller.quality_bounds import budget_ranges
from sglang_alloc_controller.settings import QualitySettings, Settings, SloSettings

SCRIPTS = Path(sys.executable).parent


def _command(each: Manifest, root: Path) -> list[str]:
    """Return a container's command line, with the pod's folders moved under `root`."""
    words = [*each["command"], *each["args"]]
    return [str(SCRIPTS / words[0]), *(_moved(word, root) for word in words[1:])]


def _moved(text: str, root: Path) -> str:
    for folder in ("/budget-tables", "/run/sglang-alloc", "/etc/sglang-alloc"):
        text = text.replace(folder, f"{root}{folder}")
    return text


def _publish(root: Path, *arguments: str) -> Path:
    """Run the pod's first step on small tables with thresholds; return the shared table."""
    shared = root / "run" / "sglang-alloc" / "model.tbl"
    for folder in (root / "budget-tables", shared.parent):
        folder.mkdir(parents=True)
    budgets = np.arange(2, 9, dtype=np.int32)
    half = (budgets // 2).astype(np.int16)
    tables = BudgetTables(
        model_id="served",
        fingerprint="ab" * 32,
        num_experts=8,
        top_k=4,
        layer_ids=np.arange(2, dtype=np.int32),
        budgets=budgets,
        quotas=np.stack([half, (budgets - half).astype(np.int16)], axis=1),
        predicted_loss=np.linspace(0.1, 0.0, len(budgets), dtype=np.float32),
        thresholds=np.zeros((len(budgets), 2), dtype=np.float32),
        threshold_predicted_loss=np.linspace(0.05, 0.0, len(budgets), dtype=np.float32),
    )
    save_budget_tables(root / "budget-tables" / "tables.npz", tables)
    command = _command(container(render("default", *arguments), "publish-table"), root)
    subprocess.run(command, check=True, capture_output=True)
    return shared


@contextmanager
def _controller(root: Path, port: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the sidecar with the ConfigMap's own file, listening on `port`."""
    manifests = render("default", "--set", f"controller.metricsPort={port}", *arguments)
    config = root / "etc" / "sglang-alloc" / "controller.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(_moved(only(manifests, "ConfigMap")["data"]["controller.yaml"], root))
    command = _command(container(manifests, "controller"), root)
    with (root / "controller.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=60)


def _logged(root: Path, event: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Wait for the first such line of the controller's log."""
    log = root / "controller.log"

    def line() -> dict[str, Any] | None:
        assert process.poll() is None, log.read_text()
        lines = log.read_text().splitlines()
        whole = (one for one in lines if f'"event": "{event}"' in one and one.endswith("}"))
        return next((json.loads(one) for one in whole), None)

    found = wait_until(line, f"the event {event}", explain=log.read_text)
    assert found is not None
    return found


def _wait_for_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        assert process.poll() is None, "the controller ended"
        try:
            with urllib.request.urlopen(url, timeout=1):
                return True
        except OSError:
            return False

    wait_until(answers, f"an answer of {url}")


def _wait_for_metric(port: int, line: str) -> None:
    def has_come() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return line in answer.read().decode().splitlines()

    wait_until(has_come, line)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_first_step_publishes_the_table_at_full_budget(tmp_path: Path) -> None:
    with SharedTable.open(_publish(tmp_path)) as table:
        assert table.model_id == "served"
        assert table.selector()[1:] == (8, 8)


@pytest.mark.parametrize(
    ("mode", "served", "floor"),
    [("", "threshold", 5), ("layer", "layer", 7), ("token", "token", 7)],
)
def test_quality_floor_is_that_of_the_mode_which_is_served(
    tmp_path: Path, mode: str, served: str, floor: int
) -> None:
    shared = _publish(tmp_path, "--set", f"worker.mode={mode}")
    bound = QualitySettings(max_predicted_loss=0.026)
    settings = Settings(
        table=str(shared), slo=SloSettings(ttft_seconds=1.0, itl_seconds=0.1), quality=bound
    )
    with SharedTable.open(shared) as table:
        assert table.mode_note == served
        assert budget_ranges(table, settings)["decode"].floor == floor


def test_controller_works_before_sglang_is_there(tmp_path: Path) -> None:
    shared, port = _publish(tmp_path), _free_port()
    with _controller(tmp_path, port) as process, SharedTable.open(shared) as table:
        _wait_for_answer(f"http://127.0.0.1:{port}/livez", process)
        assert table.heartbeat_ns() > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert table.selector()[1:] == (8, 8), "it stops at full quality"


def test_kill_switch_of_the_runbook_is_seen_and_released(tmp_path: Path) -> None:
    shared, port = _publish(tmp_path), _free_port()
    with _controller(tmp_path, port) as process:
        _wait_for_answer(f"http://127.0.0.1:{port}/livez", process)
        switch = shared.with_name("model.tbl.kill")
        switch.touch()
        _wait_for_metric(port, "sglang_alloc_controller_kill_switch 1.0")
        switch.unlink()
        _wait_for_metric(port, "sglang_alloc_controller_kill_switch 0.0")


def test_controller_that_refuses_its_settings_stays_and_leaves_the_server_alone(
    tmp_path: Path,
) -> None:
    shared = _publish(tmp_path)
    impossible = ("--set-json", "controller.config.quality.decode_floor_budget=9")
    with _controller(tmp_path, _free_port(), *impossible) as process:
        problem = _logged(tmp_path, "refused", process)["problem"]
        assert "decode_floor_budget is 9" in problem
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, "a pod that ends does not have to wait for it"
    with SharedTable.open(shared) as table:
        assert table.selector()[1:] == (8, 8)
        assert table.heartbeat_ns() == 0


def test_sglangs_own_parser_accepts_the_arguments() -> None:
    """One process for all renders: importing SGLang takes most of the time."""
    command_lines = []
    for value_set in VALUE_SETS:
        separator, *arguments = container(render(value_set), "sglang")["args"]
        assert separator == "--"
        command_lines.append(arguments)
    parse = (
        "import argparse, json, sys\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "parser = argparse.ArgumentParser()\n"
        "ServerArgs.add_cli_args(parser)\n"
        "for arguments in json.load(sys.stdin):\n"
        "    parsed = parser.parse_args(arguments)\n"
        "    print(parsed.enable_metrics, len(parsed.bucket_time_to_first_token))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", parse],
        input=json.dumps(command_lines),
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-6:] == ["True", "8"] * len(VALUE_SETS)


def test_settings_are_plain_yaml_for_people_who_read_the_config_map() -> None:
    text = only(render(), "ConfigMap")["data"]["controller.yaml"]
    assert yaml.safe_load(text)["mode"] == "shadow"
