"""Quality figures: what they say, that they add up, and that they come back by time and by table version."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_ingestion.quality import Figures, decode, encode, figures_of
from millrace_kit.clock import FakeClock

from .harness import Client, contract, lines, row, serving

VALUES = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(float("nan"))), max_size=30)


def table(values: list[float | None], **more: list) -> pa.Table:
    columns = {"x": pa.array(values, pa.float64()), **{name: pa.array(column) for name, column in more.items()}}
    return pa.table(columns)


@settings(max_examples=40, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=4))
def test_figures_of_parts_add_up_to_those_of_the_whole(parts: list[list[float | None]]) -> None:
    total = Figures()
    for version, part in enumerate(parts, start=1):
        total.add(decode(encode(figures_of([table(part)], version, [], 1))))
    every = [value for part in parts for value in part]
    finite = [value for value in every if value is not None and np.isfinite(value)]
    assert (total.rows, total.batches) == (len(every), len(parts))
    if not every:
        return
    column = total.columns["x"]
    assert (column.nulls, column.values, column.finite) == (
        every.count(None),
        len(every) - every.count(None),
        len(finite),
    )
    assert column.minimum == min(finite, default=None)
    assert column.maximum == max(finite, default=None)
    assert column.total == pytest.approx(sum(finite), abs=1e-6)


@pytest.mark.parametrize("distinct", [1, 7, 100, 900])
def test_distinct_values_are_estimated(distinct: int) -> None:
    places = np.arange(5000) % distinct
    whole = pa.table({
        "number": places, "double": places / 7, "text": [f"v{place}" for place in places],
        "at": pa.array(places, pa.timestamp("us", "UTC")), "flag": places % 2 == 0,
    })  # fmt: skip
    found = Figures()
    for start in range(0, 5000, 1000):
        found.add(figures_of([whole.slice(start, 500), whole.slice(start + 500, 500)], 1, [], 1))
    for name in ("number", "double", "text", "at"):
        assert found.columns[name].distinct == pytest.approx(distinct, rel=0.12), name
        assert found.columns[name].sampled == 5000
    assert round(found.columns["flag"].distinct) == min(2, distinct)


def test_a_large_commit_is_sampled_for_distinct_values_only() -> None:
    found = figures_of([table([float(i) for i in range(20_000)])], 1, [], 1).columns["x"]
    assert (found.sampled, found.values, found.mean) == (1000, 20_000, 9999.5)
    assert found.distinct == pytest.approx(1000, rel=0.12)


async def quality(client: Client, **request) -> list[pb.QualityBucket]:
    answer = await client.stub.GetQuality(pb.GetQualityRequest(contract="flights", **request))
    return list(answer.buckets)


async def test_buckets_by_time_and_by_version(tmp_path: Path) -> None:
    clock = FakeClock()
    async with serving(tmp_path, clock=clock, quality_bucket_s=60, quality_retention_days=1) as client:
        await client.register(contract(delay={"policies": {"range": pb.CHECK_POLICY_WARN}}))
        first = await client.write(1, lines(row("a", delay=1.0), row("b", delay=None), row("c", carrier="?"), "{"))
        await client.write(1, lines(row("a", delay=1.0), row("b", delay=None), row("c", carrier="?"), "{"))
        (bucket,) = await quality(client)
        assert (bucket.rows, bucket.batches) == (2, 1)
        assert bucket.first_table_version == bucket.last_table_version == first.table_version
        columns = {column.column: column for column in bucket.columns}
        assert (columns["delay"].values, columns["delay"].nulls, columns["delay"].mean) == (1, 1, 1.0)
        assert (round(columns["event_id"].distinct), columns["event_id"].HasField("mean")) == (2, False)
        assert [(f.subject, f.check, f.count) for f in bucket.failures] == [
            ("", "malformed_json", 1), ("carrier", "pattern_mismatch", 1)
        ]  # fmt: skip
    async with serving(tmp_path, clock=clock, quality_bucket_s=60, quality_retention_days=1) as client:
        await client.write(2, lines(row("d", delay=9000.0)))
        (bucket,) = await quality(client)
        assert (bucket.rows, {c.column: c.max for c in bucket.columns}["delay"]) == (3, 9000)
        assert ("delay", "range", pb.CHECK_POLICY_WARN) in {(f.subject, f.check, f.policy) for f in bucket.failures}
        clock.advance(60)
        second = await client.write(3, lines(row("e")))
        assert [b.rows for b in await quality(client)] == [3, 1]
        assert [b.rows for b in await quality(client, max_buckets=1)] == [1]
        assert [b.rows for b in await quality(client, table_version=first.table_version)] == [3]
        assert [b.rows for b in await quality(client, table_version=second.table_version)] == [1]
        assert [b.rows for b in await quality(client, merge=True)] == [4]
        assert [b.rows for b in await quality(client, since=bucket.end)] == [1]
        assert [b.rows for b in await quality(client, until=bucket.end)] == [3]
        clock.advance(86_400 + 60)
        assert await quality(client) == []
