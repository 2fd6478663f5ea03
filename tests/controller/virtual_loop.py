"""The real loop over a real shared table, in virtual time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.shared_table import publish_shared_table
from sglang_alloc_controller.decision_log import DecisionLog
from sglang_alloc_controller.loop import ControlLoop, Surroundings
from sglang_alloc_controller.own_metrics import OwnMetrics
from sglang_alloc_controller.samples import Reading
from sglang_alloc_controller.settings import DecisionLogSettings, Settings, parse_settings
from sglang_alloc_controller.source_poller import Observation
from sglang_alloc_controller.table_link import TableLink

NS = 1_000_000_000
SLO = {"ttft_seconds": 1.0, "itl_seconds": 0.05}


def publish_table(path: Path, num_layers: int = 6, top_k: int = 8, **fields: Any) -> None:
    """Publish tables with uniform quotas; the predicted loss falls evenly from 0.2 to 0."""
    budgets = np.arange(num_layers, num_layers * top_k + 1, dtype=np.int32)
    quotas = (budgets[:, None] + np.arange(num_layers)[None]) // num_layers
    required = {
        "model_id": "tiny-moe",
        "fingerprint": "ab" * 32,
        "num_experts": 4 * top_k,
        "top_k": top_k,
        "layer_ids": np.arange(num_layers, dtype=np.int32),
        "budgets": budgets,
        "quotas": quotas.astype(np.int16),
        "predicted_loss": np.linspace(0.2, 0.0, len(budgets)).astype(np.float32),
    }
    publish_shared_table(path, BudgetTables(**(required | fields)))


def make_settings(table: Path | str = "t.tbl", **sections: Any) -> Settings:
    """Settings for tests: no warm-up, SLOs of 1 s and 50 ms unless given."""
    content: dict[str, Any] = {"table": str(table), "slo": SLO}
    content["freshness"] = {"warmup_seconds": 0.0}
    for name, section in sections.items():
        if isinstance(section, Mapping) and isinstance(content.get(name), Mapping):
            content[name] = {**content[name], **section}
        else:
            content[name] = section
    return parse_settings(content)


class VirtualClock:
    """Monotonic time that only tests move; it starts at 1000 s."""

    def __init__(self) -> None:
        self.now_ns = 1000 * NS

    @property
    def now_seconds(self) -> float:
        return self.now_ns / NS

    def move(self, seconds: float) -> None:
        self.now_ns += round(seconds * NS)


class Line(NamedTuple):
    """What one tick left behind."""

    now_seconds: float
    prefill_budget: int
    decode_budget: int


class VirtualController:
    """The loop with a clock, a source and a log that tests hold in their hands."""

    def __init__(
        self, settings: Settings, log: DecisionLogSettings | None = None, **surroundings: Any
    ) -> None:
        self.settings = settings
        self.clock = VirtualClock()
        self.observation = Observation(None, 0, None)
        self.metrics = OwnMetrics(settings.mode, settings.slo, settings.quality)
        self.link = TableLink(Path(settings.table), lambda table: None)
        decision_log = DecisionLog(log or settings.decision_log, self.metrics.count_log_error)
        self.loop = ControlLoop(
            settings,
            self.link,
            self.metrics,
            decision_log,
            Surroundings(self._observe, lambda: self.clock.now_ns, self._sleep, **surroundings),
        )
        self.lines: list[Line] = []
        self.source: Callable[[], Reading | None] = lambda: None

    def _observe(self) -> Observation:
        reading = self.source()
        if reading is None:
            failures = self.observation.failures_total + 1
            self.observation = self.observation._replace(failures_total=failures, error="away")
        else:
            self.observation = Observation(reading, self.observation.failures_total, None)
        return self.observation

    def _sleep(self, seconds: float) -> bool:
        self.clock.move(seconds)
        return self.clock.now_seconds >= self._until_seconds

    def run_for(self, seconds: float) -> None:
        """Run the loop itself for virtual `seconds`."""
        self._until_seconds = self.clock.now_seconds + seconds
        self.loop.run()

    def tick(self, seconds: float = 0.5) -> Line:
        """Tick once and let time pass."""
        self.loop.tick()
        selector = self.link.selector()
        line = Line(self.clock.now_seconds, selector.prefill_budget, selector.decode_budget)
        self.lines.append(line)
        self.clock.move(seconds)
        return line

    def metric(self, name: str, **labels: str) -> float:
        """Return one of the controller's own metrics."""
        wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        series = f"sglang_alloc_controller_{name}" + (f"{{{wanted}}}" if wanted else "")
        for line in self.metrics.text().decode().splitlines():
            if line.startswith(series + " "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no series {series}")

    def changes(self, since_seconds: float = 0.0) -> int:
        """Count the ticks after `since_seconds` that changed a budget."""
        pairs = zip(self.lines, self.lines[1:], strict=False)
        return sum(a[1:] != b[1:] for a, b in pairs if b.now_seconds >= since_seconds)

    def reason(self, phase: str) -> str:
        """Return the exported reason of one phase."""
        return self._one_hot("reason", f'phase="{phase}",')

    def state(self) -> str:
        """Return the exported input state."""
        return self._one_hot("input_state", "")

    def _one_hot(self, name: str, labels: str) -> str:
        start = f"sglang_alloc_controller_{name}{{{labels}"
        lines = self.metrics.text().decode().splitlines()
        (line,) = [one for one in lines if one.startswith(start) and one.endswith(" 1.0")]
        return line.split('"')[-2]
