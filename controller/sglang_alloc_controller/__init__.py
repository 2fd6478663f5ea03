"""The control story: SGLang's metrics in, one selector word of the shared table out.

Its steps, in order: `source_poller` reads `sglang_metrics` or `prometheus_api`; `samples` and
`histogram_window` turn readings into samples; `slo` into errors; `control_law` into budgets;
`loop` writes them.
"""
