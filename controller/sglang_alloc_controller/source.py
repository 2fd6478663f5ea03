"""Control story, first step: the source that the settings name."""

from collections.abc import Callable

from sglang_alloc_controller.prometheus_api import PrometheusApi
from sglang_alloc_controller.samples import MetricsSource
from sglang_alloc_controller.settings import SourceSettings
from sglang_alloc_controller.sglang_metrics import SGLangMetrics


def open_source(settings: SourceSettings, clock: Callable[[], float]) -> MetricsSource:
    """Return the source; `clock` is monotonic, in seconds."""
    if settings.kind == "prometheus":
        return PrometheusApi(settings, clock)
    return SGLangMetrics(settings, clock)
