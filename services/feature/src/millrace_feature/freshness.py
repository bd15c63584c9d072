"""How long a record takes to be servable: from the bus taking it, which is this service's to keep, and from its event, which is the user's to know."""

import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from millrace_kit.bus import Message, records_topic
from prometheus_client import REGISTRY, CollectorRegistry, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from millrace_feature.batches import Batch
from millrace_feature.plan import Definitions
from millrace_feature.tiles import event_times

Floats = npt.NDArray[np.float64]

FRESHNESS = Histogram(
    "millrace_feature_freshness_seconds",
    "Time from the bus taking a batch to its values being readable.",
    ["contract"],
    buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60, 600),
)


class BulkHistogram(Collector):
    """A histogram by contract that takes many values at once: one search instead of a call a record."""

    def __init__(
        self, name: str, documentation: str, buckets: Sequence[float], registry: CollectorRegistry | None = REGISTRY
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = np.asarray(buckets, np.float64)
        self._counts: dict[str, npt.NDArray[np.int64]] = {}
        self._sums: dict[str, float] = {}
        self._lock = threading.Lock()
        if registry is not None:
            registry.register(self)

    def observe(self, contract: str, values: Floats) -> None:
        """Count `values`, in seconds."""
        size = len(self._bounds) + 1
        counts = np.bincount(self._bounds.searchsorted(values), minlength=size).astype(np.int64)
        with self._lock:
            before = self._counts.get(contract)
            self._counts[contract] = counts if before is None else before + counts
            self._sums[contract] = self._sums.get(contract, 0.0) + float(values.sum())

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """What Prometheus scrapes."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=["contract"])
        bounds = [*map(floatToGoString, self._bounds.tolist()), "+Inf"]
        with self._lock:
            for contract, counts in self._counts.items():
                buckets = list(zip(bounds, np.cumsum(counts).tolist(), strict=True))
                family.add_metric([contract], buckets, self._sums[contract])
        yield family


EVENT_FRESHNESS = BulkHistogram(
    "millrace_feature_event_freshness_seconds",
    "Time from a record's event to its values being readable.",
    (0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600, 6 * 3600, 86_400),
)


def note_readable(messages: Sequence[Message], batches: Sequence[Batch], definitions: Definitions) -> None:
    """Call it when a read can see the effects of `messages`, of which `batches` counted."""
    now_us = time.time_ns() // 1000
    for message in messages:
        contract = message.topic.removeprefix(records_topic(""))
        FRESHNESS.labels(contract).observe(max(0.0, now_us / 1000 - message.timestamp_ms) / 1000)
    columns = {view.contract: view.event_time for view in definitions.views}
    for batch in batches:
        column = columns.get(batch.contract)
        if column is None or column not in batch.table.column_names:
            continue
        times = event_times(batch.table.select([column]).drop_null(), column)
        if len(times):
            EVENT_FRESHNESS.observe(batch.contract, np.maximum(now_us - times, 0) / 1e6)
