"""The figures as Prometheus metrics, made when they are asked for, so that a request pays nothing for them."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from millrace_inference_gateway.figures import BOUNDS_MS, Figures, VersionCounts

# Every fourteenth of the fine bounds: each about twice the one before.
STEP = 14


class FiguresCollector(Collector):
    """Requests, errors and latency by model and version."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        labels = ["model", "version"]
        requests = CounterMetricFamily("millrace_gateway_requests", "Inference calls finished.", labels=labels)
        errors = CounterMetricFamily(
            "millrace_gateway_errors", "Of these, failed by the server's fault.", labels=labels
        )
        seconds = HistogramMetricFamily(
            "millrace_gateway_model_seconds", "Time a model server took for a call.", labels=labels
        )
        for model, version, counts in self._figures.versions():
            requests.add_metric([model, version], counts.requests)
            errors.add_metric([model, version], counts.errors)
            seconds.add_metric([model, version], _buckets(counts), None)
        yield from (requests, errors, seconds)


def _buckets(counts: VersionCounts) -> list[tuple[str, float]]:
    """Cumulative counts at every fourteenth bound."""
    found: list[tuple[str, float]] = []
    total = 0
    for index, bound in enumerate(BOUNDS_MS):
        total += counts.buckets[index]
        if index % STEP == 0:
            found.append((f"{bound / 1000:.6g}", total))
    return [*found, ("+Inf", counts.requests)]
