"""How long records take to be servable, as Prometheus sees it."""

import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
from millrace_feature.batches import Batch
from millrace_feature.compiler import compile_registry
from millrace_feature.freshness import EVENT_FRESHNESS, FRESHNESS, BulkHistogram, note_readable
from millrace_kit.bus import Message, records_topic
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest

BOUNDS = (0.1, 1, 60, 3600)


def test_many_values_at_once_are_what_a_histogram_counts() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bulk = BulkHistogram("age_seconds", "Age.", BOUNDS, ours)
    single = Histogram("age_seconds", "Age.", ["contract"], buckets=BOUNDS, registry=theirs)
    chance = np.random.default_rng(3)
    for contract in ("a", "b", "a"):
        # Halves, so that sums are exact, and the bounds themselves.
        values = np.concatenate([np.round(chance.exponential(100, 50) * 2) / 2, [0.0, 1.0, 60.0, 3600.0]])
        bulk.observe(contract, values)
        for value in values:
            single.labels(contract).observe(value)

    def lines(registry: CollectorRegistry) -> list[bytes]:
        return [line for line in generate_latest(registry).splitlines() if b"_created" not in line]

    assert lines(ours) == lines(theirs)
    assert len(lines(ours)) > 10


def test_batches_are_counted_by_the_bus_and_records_by_their_events(small_objects, make_registry) -> None:
    definitions = compile_registry("test", make_registry(small_objects())).definitions
    now = datetime.now(tz=UTC)
    at = [now - timedelta(seconds=20), now - timedelta(seconds=400), None, now + timedelta(hours=1)]
    table = pa.table({"at": pa.array(at, pa.timestamp("us", "UTC"))})
    message = Message(records_topic("events"), 0, 7, "events", b"", {}, int(time.time() * 1000) - 3000)

    def counts() -> tuple[dict[str, float], dict[str, float]]:
        return tuple(  # type: ignore[return-value]
            {s.labels["le"]: s.value for f in h.collect() for s in f.samples if s.name.endswith("_bucket") and s.labels["contract"] == "events"}
            for h in (FRESHNESS, EVENT_FRESHNESS)
        )  # fmt: skip

    bus, events = counts()
    note_readable([message], [Batch("events", 1, table), Batch("other", 1, table)], definitions)
    bus_after, events_after = counts()
    assert {le: n - bus.get(le, 0) for le, n in bus_after.items() if le in {"2.0", "5.0"}} == {"2.0": 0, "5.0": 1}
    grown = {le: n - events.get(le, 0) for le, n in events_after.items()}
    # One ahead of its time counts as fresh, one without event time not at all.
    assert [grown[le] for le in ("0.1", "10.0", "30.0", "300.0", "900.0", "+Inf")] == [1, 1, 2, 2, 3, 3]
