"""Demo, step 5: the report as one self-contained page."""

from __future__ import annotations

import html
import math
from typing import Any

from sglang_alloc.allocation_mode import PHASES

_STYLE = """
:root { color-scheme: light; --ink: #202124; --soft: #5f6368; --line: #e3e6ea; --good: #0b6e69; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 12px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; }
p { margin: 0 0 12px; max-width: 78ch; }
.soft, figcaption, footer { color: var(--soft); font-size: 14px; }
.verdict { font-size: 18px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px;
  margin: 24px 0 0; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px; }
.card .name { color: var(--soft); font-size: 13px; }
.card .value { font-size: 25px; font-weight: 600; letter-spacing: -0.02em; color: var(--good);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.card .beside { color: var(--soft); font-size: 13px; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 16px; }
figure svg { width: 100%; height: auto; display: block; font-family: inherit; }
figcaption { margin-top: 8px; }
table { border-collapse: collapse; width: 100%; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { text-align: right; padding: 7px 16px; border-top: 1px solid var(--line); }
thead th { border-top: 0; background: #fafbfc; color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; font-weight: 400; }
tr.group th { background: #fafbfc; color: var(--soft); font-size: 13px; padding-top: 10px; }
code { font-size: 0.92em; }
footer { margin-top: 40px; border-top: 1px solid var(--line); padding-top: 16px; }
"""

# The runs' keys in report.json and the columns that they become.
_COLUMNS = (
    ("full_before", "full quality, before"),
    ("full_after", "full quality, after"),
    ("controlled", "controlled"),
)


def render_page(report: dict[str, Any], timeline_svg: str, distribution_svg: str) -> str:
    """Return the page for report.json's content and the two plots; any text in it is escaped."""
    slo = report["slo"]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sglang-alloc: the same burst with and without the controller</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>The same burst, at full quality and under the controller</h1>
<p class="verdict">{html.escape(report["verdict"])}</p>
<p class="soft">SLOs of this run: first token within {slo["ttft_seconds"]:g} s of the request's due
time, and a mean inter-token latency of at most {1000 * slo["itl_seconds"]:g} ms.
{html.escape(report["load"]["sentence"])}</p>
<p class="soft">{html.escape(report["calm_steps"]["sentence"])}</p>
{_cards(report)}
<h2>What happened when</h2>
<figure>{timeline_svg}
<figcaption>All runs got the same requests at the same seconds, from the same server process; of
the two at full quality, before and after the controlled one, the better is drawn.
Top two: the budgets that busy and calm steps of the controlled run obeyed, and the mean over the
tokens that were served in each second. Third: the server's own count of waiting requests, once a
second. Bottom: what each request waited for its first token.</figcaption></figure>
<h2>Distributions</h2>
<figure>{distribution_svg}
<figcaption>Share of requests (left) and of tokens (right) at or below a latency.</figcaption>
</figure>
<h2>All numbers</h2>
{_table(report)}
<h2>How this was measured</h2>
{_method(report)}
<footer>{html.escape(_provenance(report))}</footer>
</main>
</body>
</html>
"""


def _cards(report: dict[str, Any]) -> str:
    before, after, controlled = (report[key] for key, _ in _COLUMNS)
    increase = controlled["heldout_nll"] - controlled["heldout_nll_full"]
    cards = (
        (
            "Within both SLOs",
            _percent(controlled["slo_attainment_ratio"]),
            f"{_percent(before['slo_attainment_ratio'])} and "
            f"{_percent(after['slo_attainment_ratio'])} at full quality",
        ),
        (
            "TTFT, 95th percentile",
            _seconds(controlled["ttft_seconds"]["p95"]),
            f"{_seconds(before['ttft_seconds']['p95'])} and "
            f"{_seconds(after['ttft_seconds']['p95'])} at full quality",
        ),
        (
            "Held-out loss",
            f"{increase:+.4f}",
            f"nats per token, on {controlled['heldout_nll_full']:.3f}",
        ),
        (
            "Budget served, prefill / decode",
            f"{controlled['mean_prefill_budget']:.1f} / {controlled['mean_decode_budget']:.1f}",
            f"mean, of {before['mean_decode_budget']:.0f}; {controlled['budget_changes']} changes",
        ),
        (
            "Failed requests",
            str(sum(run["errors"] for run in (before, after, controlled))),
            f"of {sum(run['requests'] for run in (before, after, controlled))} in all runs",
        ),
    )
    boxes = "".join(
        f'<div class="card"><div class="name">{html.escape(name)}</div>'
        f'<div class="value">{html.escape(value)}</div>'
        f'<div class="beside">{html.escape(beside)}</div></div>'
        for name, value, beside in cards
    )
    return f'<div class="cards">{boxes}</div>'


def _table(report: dict[str, Any]) -> str:
    rows: list[str] = []
    for group, entries in _table_rows(report):
        group_cell = f'<th colspan="{1 + len(_COLUMNS)}">{html.escape(group)}</th>'
        rows.append(f'<tr class="group">{group_cell}</tr>')
        for name, *values in entries:
            cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
            rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    names = "".join(f"<th>{html.escape(name)}</th>" for _, name in _COLUMNS)
    return f"<table><thead><tr><th></th>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


Rows = list[tuple[str, ...]]


def _table_rows(report: dict[str, Any]) -> list[tuple[str, Rows]]:
    full = report["full"]

    def row(name: str, *path: str, show: Any = str) -> tuple[str, ...]:
        return name, *(show(_at(report[key], path)) for key, _ in _COLUMNS)

    phases = list(full["slo_attainment_ratio_by_phase"])
    attainment = [row("whole trace", "slo_attainment_ratio", show=_percent)]
    attainment += [row(p, "slo_attainment_ratio_by_phase", p, show=_percent) for p in phases]
    latencies = [
        row(f"{name}, p{percent}", key, f"p{percent}", show=_seconds)
        for name, key in (("TTFT", "ttft_seconds"), ("inter-token latency", "itl_seconds"))
        for percent in (50, 95, 99)
    ]
    service = [
        row("requests", "requests"),
        row("errors", "errors"),
        row("queue, mean", "queue_requests", "mean", show=_one_decimal),
        row("queue, largest", "queue_requests", "max", show=_one_decimal),
        row("output tokens per second", "throughput_tokens_per_second", show=_one_decimal),
        row("requests served per second of burst", "burst_served_requests_per_second", show=_two),
        row("prompt tokens per second", "prompt_tokens_per_second", show=_one_decimal),
    ]
    quality = [
        row("prefill budget as served, mean", "mean_prefill_budget", show=_one_decimal),
        row("decode budget as served, mean", "mean_decode_budget", show=_one_decimal),
        *(
            row(
                f"{phase} budget in {kind} steps, mean",
                f"mean_budget_in_{kind}_steps",
                phase,
                show=_one_decimal,
            )
            for kind in ("busy", "calm")
            for phase in PHASES
        ),
        *(
            row(f"{phase} tokens in calm steps", "calm_tokens_ratio", phase, show=_percent)
            for phase in PHASES
        ),
        row("budget changes", "budget_changes"),
        row("held-out loss at the budgets used", "heldout_nll", show=_loss),
        row("held-out loss at full budget", "heldout_nll_full", show=_loss),
    ]
    return [
        ("Requests within both SLOs", attainment),
        ("Latency", latencies),
        ("Service", service),
        ("Quality", quality),
    ]


def _method(report: dict[str, Any]) -> str:
    paragraphs = [
        report["load"]["rule"],
        report["drift"]["sentence"],
        report["controlled"]["heldout_method"],
    ]
    levels = ", ".join(
        f"{level['prefill_budget']}/{level['decode_budget']} ({_percent(level['weight'])}: "
        f"{level['nll']:.4f})"
        for level in report["controlled"]["heldout_levels"]
    )
    paragraphs.append(
        f"Loss by prefill/decode budget (share of the served tokens: nats per token): {levels}."
    )
    return "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs)


def _provenance(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{report['date']}. {machine['cpu_model']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; server, controller and load generator share them. "
        f"Model {report['model']}, mode {report['mode']}. {versions}, commit {report['commit']}."
    )


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def _percent(ratio: float) -> str:
    return "-" if _missing(ratio) else f"{100 * ratio:.1f}%"


def _seconds(seconds: float) -> str:
    if _missing(seconds):
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _one_decimal(value: float) -> str:
    return "-" if _missing(value) else f"{value:.1f}"


def _two(value: float) -> str:
    return "-" if _missing(value) else f"{value:.2f}"


def _loss(value: float) -> str:
    return "-" if _missing(value) else f"{value:.4f}"


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
