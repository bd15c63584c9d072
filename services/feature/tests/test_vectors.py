"""Embeddings as values: what counts as one, how definitions name them, and that search finds what the definition of distance says."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_feature.compiler import compile_registry
from millrace_feature.feast_import import import_feast
from millrace_feature.packed_rows import pack_row, unpack_row
from millrace_feature.plan import LatestView, Metric, VectorField, from_json, to_json
from millrace_feature.rows import from_text, to_text
from millrace_feature.search.index import BLOCK_ROWS, IndexFullError, Memory, VectorIndex
from millrace_feature.serving import CompiledService
from millrace_feature.tiles import decode_key, encode_key
from millrace_feature.vectors import dtype, elements, pack, unpack, unpacked
from millrace_kit.errors import InvalidArgumentError

NARROW = VectorField("v", 3, is_wide=False, metric="L2")
WIDE = VectorField("v", 3, is_wide=True, metric="L2")
ANY = VectorField("v", 0, is_wide=False)
METRICS: tuple[Metric, ...] = ("L2", "cosine", "inner_product")
VALUES: list[Any] = [
    [1.0, 2.5, -0.1], None, [1.0], [], [1.0, None, 3.0], [1.0, math.nan, 3.0], [math.inf, 0.0, 0.0], [0.0, -0.0, 1e-40],
]  # fmt: skip


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32())], ids=str)
@pytest.mark.parametrize("field", [NARROW, WIDE])
def test_what_is_no_vector_of_the_length_is_missing_and_counted(kind: pa.DataType, field: VectorField) -> None:
    column = pa.chunked_array([pa.array(VALUES[:3], kind), pa.array(VALUES[3:], kind)]).slice(0)
    packed, bad = pack(column, field)
    assert [value.is_valid for value in packed] == [True, *[False] * 6, True]
    assert bad == 5  # a null is none that was given
    assert list(packed[0].as_py()) == list(
        np.array(VALUES[0], kind.value_type.to_pandas_dtype()).astype(dtype(field)).tobytes()
    )
    assert unpack(packed[0].as_py(), is_wide=field.is_wide)[:2] == [1.0, 2.5]
    # The same of a part of a column, and after rows were taken out of it.
    sliced, _bad = pack(column.slice(1, 7), field)
    assert sliced.to_pylist() == packed.to_pylist()[1:]
    lists = unpacked(packed.take(pa.array([7, 1, 0, None])), field)
    assert lists.to_pylist() == [
        unpack(packed[i].as_py(), is_wide=field.is_wide) if i is not None else None for i in (7, None, 0, None)
    ]
    numbers = elements(pa.chunked_array([packed.slice(0, 2), packed.slice(2)]), field)
    assert numbers.shape == (3, 8)
    assert numbers[:, 0].tolist() == unpack(packed[0].as_py(), is_wide=field.is_wide)
    assert np.isnan(numbers[:, 1:7]).all()


def test_other_columns_hold_no_vectors() -> None:
    for column, bad in [
        (pa.array(["[1, 2, 3]", None]), 1),
        (pa.array([1.0, 2.0]), 2),
        (pa.array([["a"], ["b"]]), 2),
        (pa.nulls(2), 0),
        (pa.array([[0, 1, 2], None], pa.list_(pa.int32(), 3)), 0),
    ]:
        packed, found = pack(column, NARROW)
        assert (packed.type, len(packed), found) == (pa.large_binary(), 2, bad)
    assert unpack(pack(pa.array([[0, 1, 2]]), NARROW)[0][0].as_py(), is_wide=False) == [0.0, 1.0, 2.0]
    lengths, bad = pack(pa.array([[1.0], [], [1.0, 2.0]]), ANY)
    assert ([len(value) for value in lengths.to_pylist()], bad) == ([4, 0, 8], 0)


def test_rows_with_vectors_survive_both_stores() -> None:
    content = np.array([0.1, -2.0, 3e38], "<f4").tobytes()
    for values in [("a", 1.5, content, None), (content,), (1.0, content)]:
        assert from_text(to_text(values)) == values
        assert unpack_row(pack_row(7, values)) == (7, values)


@given(st.lists(st.text(st.sampled_from("a\\s\x1f")), min_size=1, max_size=4))
def test_keys_of_entities_come_apart_again(values: list[str]) -> None:
    assert decode_key(encode_key(values), len(values)) == values


@pytest.fixture
def registry(make_registry: Callable[..., bytes]) -> Callable[..., bytes]:
    """A view of items with the given fields, and a service of it where asked for."""
    import_feast()
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64, String

    def make(*fields: Any, service: bool = False, tags: dict[str, str] | None = None) -> bytes:
        item = Entity(name="item", join_keys=["item"], value_type=ValueType.STRING)
        view = FeatureView(
            name="items",
            entities=[item],
            schema=[Field(name="item", dtype=String), Field(name="price", dtype=Float64), *fields],
            source=FileSource(name="items", path="millrace://items", timestamp_field="at"),
        )
        services = [FeatureService(name="main", features=[view], tags=tags or {})] if service else []
        return make_registry([item, view, *services])

    return make


def test_definitions_hold_embeddings(registry: Callable[..., bytes]) -> None:
    from feast import Field
    from feast.types import Array, Float32, Float64

    narrow = Field(
        name="narrow", dtype=Array(Float32), vector_index=True, vector_length=3, vector_search_metric="COSINE"
    )
    wide = Field(name="wide", dtype=Array(Float64), vector_length=2)
    free = Field(name="free", dtype=Array(Float32))
    plain = Field(name="narrow", dtype=Array(Float32), vector_index=True, vector_length=3)
    definitions = compile_registry("p", registry(narrow, wide, free)).definitions
    view = definitions.view("items")
    assert isinstance(view, LatestView)
    assert view.vectors == (
        VectorField("narrow", 3, is_wide=False, metric="cosine"),
        VectorField("wide", 2, is_wide=True),
        VectorField("free", 0, is_wide=False),
    )
    assert from_json(to_json(definitions)) == definitions
    # How it is searched changes the definitions, but nothing is filled anew for it.
    changed = compile_registry("p", registry(plain, wide, free)).definitions
    assert changed.view("items").vectors[0].metric == "L2"
    assert changed.digest != definitions.digest
    assert changed.view("items").group == view.group
    longer = Field(name="narrow", dtype=Array(Float32), vector_index=True, vector_length=4)
    assert compile_registry("p", registry(longer, wide, free)).definitions.view("items").group != view.group

    service = compile_registry("p", registry(narrow, wide, service=True)).definitions.services[0]
    assert service.features == (
        "items__price", "items__narrow__0", "items__narrow__1", "items__narrow__2", "items__wide__0", "items__wide__1",
    )  # fmt: skip


def test_definitions_that_cannot_be_kept_are_named(registry: Callable[..., bytes]) -> None:
    from feast import Field
    from feast.types import Array, Float32, Int64, String

    def refused(*fields: Any, **more: Any) -> str:
        with pytest.raises(InvalidArgumentError) as caught:
            compile_registry("p", registry(*fields, **more))
        return caught.value.message

    def field(**more: Any) -> Any:
        return Field(**{"name": "v", "dtype": Array(Float32), "vector_index": True, "vector_length": 3, **more})

    assert "items.v has a vector_index, so it needs a vector_length" in refused(field(vector_length=0))
    assert "at most 16384" in refused(field(vector_length=16_385))
    assert "at most 16384" in refused(field(vector_index=False, vector_length=-1))
    assert "'hamming'" in refused(field(vector_search_metric="hamming"))
    assert "items.v has a vector_index; only newest rows" in refused(field(dtype=String))
    assert "items.v has a type" in refused(field(dtype=Array(Int64), vector_index=False))
    assert "items.v has no vector_length" in refused(field(vector_index=False, vector_length=0), service=True)
    clash = Field(name="v__1", dtype=Int64)
    assert "has two items__v__1" in refused(field(), clash, service=True)


def test_vectors_are_numbers_of_the_models_vector(registry: Callable[..., bytes]) -> None:
    from feast import Field
    from feast.types import Array, Float32

    field = Field(name="v", dtype=Array(Float32), vector_length=3)
    definitions = compile_registry("p", registry(field, service=True)).definitions
    service = CompiledService(definitions.services[0], definitions)
    content = np.array([0.5, 1.5, 2.5], "<f4").tobytes()
    assert service.places == [(0, 0), (0, 1), (0, 1), (0, 1)]
    view = definitions.view("items")
    assert view.features == ("price", "v")

    class Known:
        def latest(self, ask: Any) -> list[Any]:
            return [(1, (9.0, content)), (1, (None, None)), None][: len(ask.keys)]

        def floats(self, ask: Any) -> None:
            return None

    rows = [{"item": "a"}, {"item": "b"}, {"item": "c"}]
    vectors = service.vectors(service.asks(rows, 5), Known(), rows, 5)
    assert vectors[0].values == [9.0, 0.5, 1.5, 2.5]
    assert vectors[0].statuses == [1, 1, 1, 1]
    assert [vector.statuses for vector in vectors[1:]] == [[2, 2, 2, 2]] * 2
    assert all(math.isnan(value) for vector in vectors[1:] for value in vector.values)


def by_definition(vectors: dict[str, list[float]], query: list[float], metric: Metric) -> list[tuple[float, str]]:
    """(distance, key) of every vector, nearest first."""
    found = []
    for key, vector in vectors.items():
        product = math.fsum(a * b for a, b in zip(vector, query, strict=True))
        if metric == "L2":
            distance = math.dist(vector, query)
        elif metric == "inner_product":
            distance = -product
        else:
            size = math.hypot(*vector) * math.hypot(*query)
            distance = 1 - product / size if size else 1.0
        found.append((distance, key))
    return sorted(found)


def put(index: VectorIndex, field: VectorField, vectors: dict[str, list[float] | None], time_us: int = 5) -> None:
    rows = [None if v is None else (time_us, ("x", np.array(v, dtype(field)).tobytes())) for v in vectors.values()]
    index.put(list(vectors), rows, 1)


numbers = st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-30, 3e37])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=40),
    st.lists(numbers, min_size=3, max_size=3).filter(any),
    st.integers(1, 50),
    st.sampled_from(METRICS),
    st.sampled_from([NARROW, WIDE]),
)
def test_search_is_that_of_the_definition(
    vectors: list[list[float]], query: list[float], count: int, metric: Metric, field: VectorField
) -> None:
    index = VectorIndex(field, Memory(1 << 30))
    named = {f"k{i}": vector for i, vector in enumerate(vectors)}
    put(index, field, dict(named))
    found = index.nearest(np.array(query), metric, count, oldest_us=None)
    expected = by_definition(named, query, metric)
    distances = {key: distance for distance, key in expected}
    assert len(found) == len(set(found)) == min(count, len(vectors))
    # Which of two vectors as far as a rounding of the last bit comes first is free.
    got, wanted = [distances[key] for key in found], [distance for distance, _key in expected[: len(found)]]
    assert got == pytest.approx(wanted, rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("metric", METRICS)
def test_near_ties_among_many_rows_are_told_apart(metric: Metric) -> None:
    """Float32 products cannot tell these vectors apart, float64 can."""
    rng = np.random.default_rng(5)
    length = 96
    field = VectorField("v", length, is_wide=False, metric=metric)
    base = rng.normal(size=length)
    rows = (base + rng.normal(scale=1e-6, size=(BLOCK_ROWS + 500, length))).astype(np.float32).astype(np.float64)
    index = VectorIndex(field, Memory(1 << 30))
    put(index, field, {f"{i:05}": row.tolist() for i, row in enumerate(rows)})
    query = base + rng.normal(scale=1e-6, size=length)
    found = index.nearest(query, metric, 20, oldest_us=None)
    products, sizes = rows @ query, np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
    far = {"L2": np.linalg.norm(rows - query, axis=1), "cosine": 1 - products / sizes, "inner_product": -products}[
        metric
    ]
    assert sorted(far[[int(key) for key in found]]) == pytest.approx(np.sort(far)[:20], rel=0, abs=1e-12)


def test_an_index_follows_its_rows() -> None:
    index = VectorIndex(NARROW, Memory(1 << 30))
    rng = random.Random(3)
    kept: dict[str, list[float]] = {}
    for _turn in range(300):
        key = f"k{rng.randrange(40)}"
        if rng.random() < 0.3:
            kept.pop(key, None)
            if rng.random() < 0.5:
                put(index, NARROW, {key: None})
            else:
                index.put([key], [(9, ("x", None))], 1)
        else:
            kept[key] = [float(rng.randrange(9)) for _i in range(3)]
            put(index, NARROW, {key: kept[key]})
    query = np.array([1.0, 2.0, 3.0])
    expected = [key for _distance, key in by_definition(kept, query.tolist(), "L2")]
    assert index.nearest(query, "L2", 100, oldest_us=None) == expected
    assert index.rows == len(kept)
    put(index, NARROW, {"late": [1.0, 2.0, 3.0]}, time_us=50)
    assert index.nearest(query, "L2", 100, oldest_us=50) == ["late"]
    index.keep({"late"})
    assert (index.nearest(query, "L2", 100, oldest_us=None), index.rows) == (["late"], 1)


def test_memory_has_a_bound() -> None:
    memory = Memory(BLOCK_ROWS * 400)
    index = VectorIndex(NARROW, memory)
    put(index, NARROW, {f"k{i}": [0.0, 0.0, 1.0] for i in range(BLOCK_ROWS)})
    with pytest.raises(IndexFullError):
        put(index, NARROW, {"more": [0.0, 0.0, 1.0]})
    put(index, NARROW, {"k1": [5.0, 0.0, 1.0]})  # what is there can still change
    assert memory.used > 0
    index.release()
    assert memory.used == 0
