"""The stream and the lake agree, bit for bit, whatever order records come in and however often the process restarts."""

import asyncio
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from millrace_api.events.v1 import events_pb2
from millrace_feature.batches import plan_change, read_messages
from millrace_feature.compiler import compile_registry
from millrace_feature.embedded import EmbeddedOnlineStore
from millrace_feature.index import WindowReader
from millrace_feature.lake import Lake, Limits
from millrace_feature.plan import Aggregate, Definitions, LatestView, ServicePlan, ViewUse, WindowView
from millrace_feature.redis_store import RedisOnlineStore
from millrace_feature.rows import order_of
from millrace_feature.serving import Serving
from millrace_feature.settings import RedisSettings
from millrace_feature.store import OnlineStore
from millrace_feature.training import Build, Labels
from millrace_kit.bus import Message, records_topic

BASE = datetime(2013, 3, 10, 4, 30, tzinfo=UTC)
BASE_US = int(BASE.timestamp()) * 1_000_000
MINUTE_US = 60_000_000
HOP_US = 5 * MINUTE_US
FUNCTIONS = ("count", "sum", "mean", "min", "max")
WINDOWS_US = (10 * MINUTE_US, 60 * MINUTE_US, 1440 * MINUTE_US)

WINDOWED = WindowView(
    "w", "events", "at", ("user", "shop"), HOP_US,
    tuple(Aggregate(f"{c}_{f}_{w}", c, f, w) for c in ("amount", "flag", "text") for w in WINDOWS_US for f in FUNCTIONS),
)  # fmt: skip
NEWEST = LatestView("n", "events", "at", ("user",), 90 * MINUTE_US, ("amount", "ratio"))
FOREVER = LatestView("f", "events", "at", ("shop",), 0, ("amount",))
PLAN = ServicePlan(
    "s",
    (*(f"w__{a.feature}" for a in WINDOWED.aggregates), "n__amount", "n__ratio", "f__amount"),
    (ViewUse("w", "w", ("user", "shop")), ViewUse("n", "n", ("user",)), ViewUse("f", "f", ("shop",))),
    (),
    (),
)
DEFINITIONS = Definitions(
    "p",
    "d" * 64,
    (("asks", "at"), ("events", "at")),
    (("shop", "int64"), ("user", "string")),
    (WINDOWED, NEWEST, FOREVER),
    (PLAN,),
)
SCHEMA = pa.schema(
    [("at", pa.timestamp("us", tz="UTC")), ("user", pa.string()), ("shop", pa.int64()), ("amount", pa.int64()),
     ("flag", pa.bool_()), ("text", pa.string()), ("ratio", pa.float64())]
)  # fmt: skip
ASKS = pa.schema(
    [
        ("id", pa.string()),
        ("at", pa.timestamp("us", tz="UTC")),
        ("user", pa.string()),
        ("shop", pa.int64()),
        ("y", pa.int64()),
    ]
)

users = st.sampled_from(["a", "b", "a\x1f", "\\"]) | st.none()
shops = st.sampled_from([1, 2]) | st.none()
# A grid around hop borders, and free microseconds between.
moments = st.builds(
    lambda hops, extra: BASE_US + hops * HOP_US + extra,
    st.integers(0, 320),
    st.sampled_from([-1, 0, 1]) | st.integers(0, HOP_US),
)
events = st.fixed_dictionaries(
    {
        "at": moments,
        "user": users,
        "shop": shops,
        "amount": st.integers(-(10**9), 10**9) | st.none(),
        "flag": st.booleans() | st.none(),
        "text": st.sampled_from(["x", ""]) | st.none(),
        "ratio": st.sampled_from([0.1, 0.7, math.nan]) | st.none(),
    }
)
batches = st.lists(
    st.tuples(st.lists(events, min_size=1, max_size=12), st.booleans(), st.booleans()), min_size=1, max_size=6
)
asks = st.lists(st.tuples(moments, users, shops), min_size=1, max_size=8)


def instant(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


def table_of(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist([{**row, "at": instant(row["at"])} for row in rows], SCHEMA)


def message(table: pa.Table, number: int, version: int, offset: int) -> Message:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    fact = events_pb2.RecordsLanded(
        contract="events",
        arrow_ipc=sink.getvalue().to_pybytes(),
        table_version=version,
        source="s",
        source_offset=number,
    )
    return Message(records_topic("events"), 0, offset, "", fact.SerializeToString(), {}, 0)


def expected(rows: list[dict], at: int, user: str | None, shop: int | None) -> list[float]:
    """The features by their definition, one event at a time."""
    end = at // HOP_US * HOP_US
    out: list[float] = []
    for aggregate in WINDOWED.aggregates:
        if user is None or shop is None:
            out.append(math.nan)
            continue
        values = []
        for row in rows:
            if (row["user"], row["shop"]) == (user, shop) and end - aggregate.window_us <= row["at"] < end:
                value = row[aggregate.column]
                if value is not None:
                    values.append(0 if aggregate.column == "text" else int(value))
        match aggregate.function:
            case "count":
                out.append(float(len(values)))
            case _ if not values:
                out.append(math.nan)
            case "sum":
                out.append(float(sum(values)))
            case "mean":
                out.append(sum(values) / len(values))
            case "min":
                out.append(float(min(values)))
            case "max":
                out.append(float(max(values)))

    def newest(key: str, wanted: object, columns: tuple[str, ...], ttl: int) -> list[float]:
        found = [r for r in rows if r[key] == wanted and r["at"] <= at] if wanted is not None else []
        clean = [(r["at"], tuple(None if r[c] is None or r[c] != r[c] else r[c] for c in columns)) for r in found]
        best = max(clean, key=lambda item: (item[0], order_of(item[1])), default=None)
        if best is None or (ttl and at - best[0] > ttl):
            return [math.nan] * len(columns)
        return [math.nan if v is None else float(v) for v in best[1]]

    return out + newest("user", user, NEWEST.features, NEWEST.ttl_us) + newest("shop", shop, FOREVER.features, 0)


def same(left: list[float], right: list[float]) -> bool:
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(left, right, strict=True))


class Pipeline:
    """The stream side, restartable: what the worker does without its loop."""

    def __init__(self, make_store: Callable[[], OnlineStore]) -> None:
        self._make_store = make_store
        self.runner = asyncio.Runner()
        self.restart()

    def restart(self) -> None:
        self.store = self._make_store()
        views = {view.group: view for view in DEFINITIONS.views}
        if not self.store.groups():
            for view in views.values():
                empty = [] if isinstance(view, LatestView) else _no_tiles(view)
                assert self.store.reserve(view, -1)
                self.store.fill(view, empty, version=-1, followed=None)
        self.store.open(views.values())
        self.serving = Serving(self.store, read_behind_us=10**15, reader_of=lambda *_: None)
        self.serving.activate(DEFINITIONS)

    def close(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    def apply(self, *messages: Message) -> None:
        reading = read_messages(messages, self.store.is_seen)
        cuts, followed = self.store.groups(), self.store.followed()
        change = plan_change(reading, DEFINITIONS, cuts=cuts, followed=followed, until_us=1 << 62)
        self.store.apply(replace(change, starts=dict(self.store.positions())))


def _no_tiles(view: WindowView):
    from millrace_feature.worker import _empty

    return _empty(view)


STORES = pytest.mark.parametrize("store_kind", ["embedded", pytest.param("redis", marks=pytest.mark.redis)])
SLACK = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@pytest.fixture
def open_store(store_kind: str, request: pytest.FixtureRequest) -> Callable[[Path], Callable[[], OnlineStore]]:
    """Makes what opens the same store again and again; another one for another folder."""
    url = request.getfixturevalue("redis_url") if store_kind == "redis" else ""

    def of(folder: Path) -> Callable[[], OnlineStore]:
        if url:
            chosen = RedisSettings(url=url, prefix=f"{folder.name}:", read_timeout_s=5)
            return lambda: RedisOnlineStore(chosen)
        return lambda: EmbeddedOnlineStore(folder / "online.sqlite")

    return of


@STORES
@settings(max_examples=20, deadline=None, suppress_health_check=SLACK)
@given(given_batches=batches, given_asks=asks)
def test_stream_lake_and_definition_agree(open_store, given_batches, given_asks) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pipeline = Pipeline(open_store(root))
        rows: list[dict] = []
        offset = 0
        for number, (batch, twice, restart) in enumerate(given_batches):
            table = table_of(batch)
            write_deltalake(str(root / "lake/events"), table, mode="append")
            rows += batch
            for _ in range(2 if twice else 1):
                pipeline.apply(message(table, number + 1, number, offset))
                offset += 1
            if restart:
                pipeline.runner.run(pipeline.store.close())
                pipeline.restart()
        questions = [
            {"id": f"{i:03}", "at": instant(at), "user": user, "shop": shop, "y": i}
            for i, (at, user, shop) in enumerate(given_asks)
        ]
        write_deltalake(str(root / "lake/asks"), pa.Table.from_pylist(questions, ASKS))
        lake = Lake(str(root / "lake"), Limits(512, 1, root / "spill"))
        labels = Labels("asks", "asks", "id", "y", None, None, None)
        build = Build(lake, PLAN, DEFINITIONS, labels, max_rows=1000)
        build.run({"asks": 0, "events": len(given_batches) - 1}, root / "set.parquet")
        offline = {row["y"]: row for row in pq.read_table(root / "set.parquet").to_pylist()}
        service = pipeline.serving.service("s").service
        for i, (at, user, shop) in enumerate(given_asks):
            wanted = expected(rows, at, user, shop)
            (vector,) = pipeline.runner.run(pipeline.serving.read(service, [{"user": user, "shop": shop}], at))
            assert same(vector.values, wanted), (vector.values, wanted)
            assert same([offline[i][name] for name in PLAN.features], wanted)
        pipeline.close()


@STORES
@settings(max_examples=20, deadline=None, suppress_health_check=SLACK)
@given(given_batches=batches, hops=st.integers(0, 320), behind=st.integers(0, 200))
def test_pruning_changes_no_answer_it_may_not(open_store, given_batches, hops, behind) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(open_store(Path(folder)))
        rows: list[dict] = []
        for number, (batch, _, _) in enumerate(given_batches):
            pipeline.apply(message(table_of(batch), number + 1, number, number))
            rows += batch
        bound = BASE_US + hops * HOP_US
        for view in DEFINITIONS.views:
            pipeline.store.prune(view, bound)
        service = pipeline.serving.service("s").service
        for _ in range(2):
            for at in (bound, bound + behind * MINUTE_US):
                for user, shop in (("a", 1), ("b", 2), ("a\x1f", 1)):
                    (vector,) = pipeline.runner.run(pipeline.serving.read(service, [{"user": user, "shop": shop}], at))
                    assert same(vector.values, expected(rows, at, user, shop))
            pipeline.runner.run(pipeline.store.close())
            pipeline.restart()
        pipeline.close()


def test_a_reader_gives_empty_windows_for_an_unknown_entity() -> None:
    reader = WindowReader(WINDOWED)
    assert [v for v in reader.empty if not math.isnan(v)] == [0.0] * 9
    assert all(math.isnan(v) for v in reader.missing)


def test_nonsense_registries_are_refused() -> None:
    from millrace_kit.errors import InvalidArgumentError

    for content in (b"\x00", b"\x0a\x02\x0a\x00", b"\x12\x34"):
        with pytest.raises(InvalidArgumentError, match="feast_registry"):
            compile_registry("p", content)
