"""A controller whose law looks ahead, beside an engine that has more to do than full carries."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_counters import Engine
from virtual_loop import VirtualController, make_settings

from sglang_alloc_controller.samples import Reading

PROMPT_TOKENS = 100


def write_cost_model(path: Path, full_budget: int = 48, floor_budget: int = 6) -> str:
    """Write step times that halve from full to floor, as `sglang-alloc bench` writes them."""
    lines = ["phase,concurrency,budget,prefill_prompt_tokens,median_ms"]
    for budget, share in ((floor_budget, 0.5), (full_budget, 1.0)):
        lines += [f"prefill,{size},{budget},100,{90 * size * share}" for size in (1, 20)]
        lines += [f"decode,{size},{budget},,{2.25 * size * share}" for size in (8, 16)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def looking_ahead(
    table: Path, surroundings: dict[str, Any] | None = None, **sections: Any
) -> tuple[VirtualController, Engine]:
    """Return a controller of `table` and its engine, which runs 16 requests at once."""
    cost_model = write_cost_model(table.with_name("cost.csv"))
    sections["quality"] = {"cost_model": cost_model, **sections.get("quality", {})}
    controller = VirtualController(make_settings(table, **sections), **(surroundings or {}))
    engine = Engine(controller)
    engine.running_requests = 16.0

    def reading() -> Reading:
        found = engine()
        return replace(found, prefill_tokens=PROMPT_TOKENS * found.event_count("ttft"))

    controller.source = reading
    return controller, engine


def run(controller: VirtualController, seconds: float) -> None:
    """Tick for so many virtual seconds."""
    for _ in range(round(seconds / 0.5)):
        controller.tick()
