"""Sketches: as exact as they say, the same whatever they were made of and in which order, and kept in a form that later versions read."""

import numpy as np
import pyarrow as pa
import pytest
from millrace_feature.cells import Cells
from millrace_feature.functions import Schema, canonical
from millrace_feature.plan import Aggregate, WindowView
from millrace_feature.sketches import bucket_cells, bucket_values, distinct_cells, hashes
from millrace_feature.tile_fields import FieldChange, layout_of, pack_cells, unpack_cells
from millrace_feature.tiles import merged_tiles, reduce_rows
from millrace_feature.windows import WindowReader, window_features

MINUTE_US = 60_000_000
FUNCTIONS = ("distinct", "p1", "p50", "p99", "std", "last")
VIEW = WindowView(
    "v", "c", "at", ("k",), 5 * MINUTE_US,
    tuple(Aggregate(f"{f}_{hours}", "x", f, hours * 60 * MINUTE_US) for f in FUNCTIONS for hours in (1, 24)),
)  # fmt: skip


def table(values: object, at: object, keys: int = 1) -> pa.Table:
    size = len(values)  # type: ignore[arg-type]
    return pa.table(
        {"k": [f"e{i % keys}" for i in range(size)], "at": pa.array(at, pa.timestamp("us", "UTC")), "x": values}
    )


def tiles_of(rows: pa.Table):
    return reduce_rows(rows, keys=["k"], event_time="at", schema=VIEW.schema, unit_us=VIEW.step_us)


@pytest.mark.parametrize("size", [1, 10, 300, 5_000, 200_000])
def test_distinct_counts_are_within_their_error(size: int) -> None:
    values = np.random.default_rng(size).permutation(np.arange(size, dtype=np.int64) * 7919 - 10**6)
    found = window_features(
        VIEW, tiles_of(table(values, np.full(size, 10))), np.zeros(1, np.int64), np.array([5 * MINUTE_US])
    )
    assert abs(found["distinct_1"][0] - size) <= max(1, 0.05 * size)  # three standard errors


def test_percentiles_are_within_a_bucket_for_every_size_of_value() -> None:
    chance = np.random.default_rng(3)
    values = np.concatenate(
        [chance.lognormal(0, 8, 20_000), -chance.lognormal(0, 8, 10_000), np.zeros(50), [1e308, 5e-324]]
    )
    found = window_features(
        VIEW, tiles_of(table(values, np.full(len(values), 10))), np.zeros(1, np.int64), np.array([5 * MINUTE_US])
    )
    for name, quantile in (("p1_1", 0.01), ("p50_1", 0.5), ("p99_1", 0.99)):
        exact = np.sort(values)[int(quantile * (len(values) - 1))]
        assert abs(found[name][0] - exact) <= abs(exact) / 128
    assert (np.diff(bucket_cells(np.sort(values))) >= 0).all()
    away = np.abs(values) > 1e-300
    assert (np.abs(bucket_values(bucket_cells(values))[away] - values[away]) <= np.abs(values[away]) / 128).all()


def test_parts_in_any_order_and_coarse_tiles_give_the_bits_of_the_whole() -> None:
    chance = np.random.default_rng(5)
    rows = table(chance.integers(-500, 500, 4_000), chance.integers(0, 2 * 86_400_000_000, 4_000), keys=3)
    whole = tiles_of(rows)
    parts = [tiles_of(rows.take(part)) for part in np.array_split(chance.permutation(4_000), 7)]
    put = parts[0]
    for part in parts[1:]:
        put = merged_tiles(put, part)
    reader, end = WindowReader(VIEW), 2 * 288 - 5
    wanted = window_features(VIEW, whole, np.arange(3), np.full(3, end * VIEW.hop_us))
    change = FieldChange(layout_of(VIEW), [put])
    content = dict(change.content(None))
    online = reader.read([[content[f"e{i}"].get(name) for name in reader.fields(end).names] for i in range(3)], end)
    for place, name in enumerate(VIEW.features):
        codes = [whole.keys.index(f"e{i}") for i in range(3)]
        found, expected = np.array([row[place] for row in online]), wanted[name][codes]
        assert np.allclose(found, expected, rtol=1e-12) if "std" in name else np.array_equal(found, expected), name


def test_what_is_kept_means_the_same_in_later_versions() -> None:
    columns = [
        pa.array([5, None, -7]),
        pa.array([5.0, float("nan"), 0.5]),
        pa.array(["x", None, ""]),
        pa.array([True, False, None]),
    ]
    kept = []
    for column in columns:
        words, valid = hashes(pa.chunked_array([column]))
        kept.append([tuple(int(part) for part in cell) for cell in zip(*distinct_cells(words[valid]), strict=True)])
    assert kept == [[(1584, 3), (1729, 1)], [(1584, 3), (1511, 1)], [(1269, 1), (2891, 3)], [(2320, 1), (3618, 5)]]
    assert bucket_cells(np.array([-1.0, 0.0, 1.0, 1000.0])).tolist() == [65600, 131072, 196544, 197181]
    cells = Cells(np.array([0, 11]), np.array([5, 1 << 18]), np.array([3, 1 << 31]))
    assert pack_cells(cells, 12) == bytes.fromhex("0005000000030000000b0000040000000080")
    back = unpack_cells(pack_cells(cells, 12), 12)
    assert [back.places.tolist(), back.ids.tolist(), back.weights.tolist()] == [[0, 11], [5, 1 << 18], [3, 1 << 31]]


def test_names_of_functions() -> None:
    names = (
        "avg",
        "stddev",
        "variance",
        "stddev_pop",
        "median",
        "p5",
        "p99.90",
        "approx_percentile(0.5)",
        "approx_percentile(.999)",
    )
    assert [canonical(name) for name in names] == [
        "mean",
        "std",
        "var",
        "std_pop",
        "p50",
        "p5",
        "p99.9",
        "p50",
        "p99.9",
    ]
    assert [canonical(name) for name in ("count_distinct", "p101", "p", "approx_percentile(2)", "", "P50")] == [
        None
    ] * 6
    assert Schema.of([("a", "count"), ("b", "p50"), ("b", "p95"), ("a", "std")]) == Schema(
        ("a", "b"), (0,), (), (), ((1, "percentile"),)
    )
