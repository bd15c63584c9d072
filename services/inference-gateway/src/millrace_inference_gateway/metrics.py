"""Figures and routes as Prometheus metrics, made when they are asked for, so that a request pays nothing for them."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from millrace_inference_gateway.concurrency_limits import ConcurrencyLimits
from millrace_inference_gateway.figures import BOUNDS_MS, Figures, VersionCounts
from millrace_inference_gateway.prediction_log import LogCounts
from millrace_inference_gateway.routes import WEIGHT_UNITS, RouteTable

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


class LimitsCollector(Collector):
    """The limits of requests at once that were found."""

    def __init__(self, limits: ConcurrencyLimits) -> None:
        self._limits = limits

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        limit = GaugeMetricFamily(
            "millrace_gateway_concurrency_limit",
            "Requests of a version that may be under way, found from its latency.",
            labels=["model", "version", "priority"],
        )
        baseline = GaugeMetricFamily(
            "millrace_gateway_baseline_seconds",
            "A version's latency without waiting, as measured.",
            labels=["model", "version"],
        )
        for (model, version), limits in self._limits.limits.items():
            limit.add_metric([model, version, "normal"], limits.normal)
            limit.add_metric([model, version, "low"], limits.low)
        for (model, version), milliseconds in self._limits.baselines_ms.items():
            baseline.add_metric([model, version], milliseconds / 1e3)
        yield from (limit, baseline)


class RoutesCollector(Collector):
    """The routes in force: weight and servers of each version; and what the prediction log wrote and lost."""

    def __init__(self, in_force: Callable[[], RouteTable | None], counts: Callable[[], LogCounts]) -> None:
        self._in_force = in_force
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        labels = ["model", "version", "role"]
        weight = GaugeMetricFamily(
            "millrace_gateway_weight_percent", "Share of a model's requests that goes to a version.", labels=labels
        )
        endpoints = GaugeMetricFamily(
            "millrace_gateway_endpoints", "Servers of a version in rotation, healthy or not.", labels=labels
        )
        for arm in (self._in_force() or RouteTable()).arms.values():
            place = [arm.model, arm.version, "candidate" if arm.candidate else "stable"]
            weight.add_metric(place, arm.weight * 100 / WEIGHT_UNITS)
            endpoints.add_metric(place, len(arm.endpoints))
        counts = self._counts()
        logged = CounterMetricFamily("millrace_gateway_predictions_logged", "Predictions on the bus.")
        logged.add_metric([], counts.logged)
        dropped = CounterMetricFamily("millrace_gateway_predictions_dropped", "Answered predictions the log lost.")
        dropped.add_metric([], counts.dropped)
        yield from (weight, endpoints, logged, dropped)


def _buckets(counts: VersionCounts) -> list[tuple[str, float]]:
    """Cumulative counts at every fourteenth bound."""
    found: list[tuple[str, float]] = []
    total = 0
    for index, bound in enumerate(BOUNDS_MS):
        total += counts.buckets[index]
        if index % STEP == 0:
            found.append((f"{bound / 1000:.6g}", total))
    return [*found, ("+Inf", counts.requests)]
