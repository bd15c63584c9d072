"""The stream and the lake agree, bit for bit, whatever order records come in and however often the process restarts."""

import asyncio
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from millrace_api.events.v1 import events_pb2
from millrace_feature.batches import plan_change, read_messages
from millrace_feature.compiler import compile_registry
from millrace_feature.embedded import EmbeddedOnlineStore
from millrace_feature.functions import quantile_of
from millrace_feature.lake import Lake, Limits
from millrace_feature.plan import Aggregate, Definitions, LatestView, ServicePlan, ViewUse, WindowView
from millrace_feature.redis_store import RedisOnlineStore
from millrace_feature.rows import order_of
from millrace_feature.serving import Serving
from millrace_feature.settings import RedisSettings
from millrace_feature.store import Content, OnlineStore
from millrace_feature.training import Build, Labels
from millrace_feature.windows import WindowReader
from millrace_feature.worker import tiles_to_fill
from millrace_kit.bus import Message, records_topic
from millrace_kit.errors import FailedPreconditionError

BASE = datetime(2013, 3, 10, 4, 30, tzinfo=UTC)
BASE_US = int(BASE.timestamp()) * 1_000_000
MINUTE_US = 60_000_000
HOP_US = 5 * MINUTE_US
FUNCTIONS = ("count", "sum", "mean", "min", "max")
MORE = (*FUNCTIONS, "std", "var_pop", "first", "last", "distinct", "p50", "p95")
WINDOWS_US = (10 * MINUTE_US, 60 * MINUTE_US, 1440 * MINUTE_US)
COLUMNS = ("amount", "flag", "text", "ratio")


def aggregates(functions: tuple[str, ...], windows: tuple[tuple[int, int], ...]) -> tuple[Aggregate, ...]:
    return tuple(
        Aggregate(f"{column}_{function}_{width}_{slide}", column, function, width, slide)
        for column in COLUMNS
        for width, slide in windows
        for function in functions
    )


PLAIN = WindowView(
    "plain", "events", "at", ("user", "shop"), HOP_US, aggregates(FUNCTIONS, tuple((w, 0) for w in WINDOWS_US))
)
WINDOWED = WindowView(
    "w", "events", "at", ("user", "shop"), HOP_US, aggregates(MORE, tuple((w, 0) for w in WINDOWS_US))
)
FRESH = WindowView(
    "fresh",
    "events",
    "at",
    ("user",),
    HOP_US,
    aggregates(MORE, ((60 * MINUTE_US, 0), (720 * MINUTE_US, 60 * MINUTE_US))),
    1,
)
MINUTES = WindowView(
    "minutes", "events", "at", ("shop",), HOP_US, aggregates(MORE, ((60 * MINUTE_US, 60 * MINUTE_US),)), MINUTE_US
)
TIMELY = WindowView(
    "timely", "events", "at", ("user",), HOP_US, aggregates(("count", "sum", "last"), ((1440 * MINUTE_US, 0),)),
    arrived_at="came", late_us=30 * MINUTE_US,
)  # fmt: skip
WINDOW_VIEWS = (PLAIN, WINDOWED, FRESH, MINUTES, TIMELY)
NEWEST = LatestView("n", "events", "at", ("user",), 90 * MINUTE_US, ("amount", "ratio"))
FOREVER = LatestView("f", "events", "at", ("shop",), 0, ("amount",))
PLAN = ServicePlan(
    "s",
    (*(f"{v.name}__{a.feature}" for v in WINDOW_VIEWS for a in v.aggregates), "n__amount", "n__ratio", "f__amount"),
    (*(ViewUse(v.name, v.name, v.join_keys) for v in (*WINDOW_VIEWS, NEWEST, FOREVER)),),
    (),
    (),
)
DEFINITIONS = Definitions(
    "p",
    "d" * 64,
    (("asks", "at"), ("events", "at")),
    (("shop", "int64"), ("user", "string")),
    (*WINDOW_VIEWS, NEWEST, FOREVER),
    (PLAN,),
)
SCHEMA = pa.schema(
    [("at", pa.timestamp("us", tz="UTC")), ("user", pa.string()), ("shop", pa.int64()), ("amount", pa.int64()),
     ("flag", pa.bool_()), ("text", pa.string()), ("ratio", pa.float64()),
     ("came", pa.timestamp("us", tz="UTC"))]
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
        "ratio": st.sampled_from([0.1, -0.7, 1e300, 0.0, math.nan])
        | st.floats(-1e6, 1e6).map(lambda v: round(v, 6))
        | st.none(),
        "late": st.sampled_from([0, 30 * MINUTE_US, 30 * MINUTE_US + 1]) | st.none(),
    }
)
batches = st.lists(
    st.tuples(st.lists(events, min_size=1, max_size=12), st.booleans(), st.booleans()), min_size=1, max_size=6
)
asks = st.lists(st.tuples(moments, users, shops), min_size=1, max_size=8)


def instant(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


def table_of(rows: list[dict]) -> pa.Table:
    def came(row: dict) -> datetime | None:
        return instant(row["at"] + row["late"]) if row["late"] is not None else None

    return pa.Table.from_pylist([{**row, "at": instant(row["at"]), "came": came(row)} for row in rows], SCHEMA)


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


def window_of(view: WindowView, aggregate: Aggregate, at: int) -> tuple[int, int]:
    """[start, end) of the event times that count at `at`."""
    slide = aggregate.slide_us or view.hop_us
    edge = at // slide * slide
    return edge - aggregate.window_us, at // view.head_us * view.head_us if view.head_us else edge


def values_of(
    view: WindowView, aggregate: Aggregate, rows: list[dict], at: int, keys: dict
) -> list[tuple[int, object]]:
    """(time, raw value) of what counts, in order of (time, number)."""
    start, end = window_of(view, aggregate, at)
    chosen = [r for r in rows if start <= r["at"] < end and all(r[k] == keys[k] for k in view.join_keys)]
    if view.late_us:
        chosen = [r for r in chosen if r["late"] is None or r["late"] <= view.late_us]
    column = aggregate.column
    found = [(r["at"], r[column]) for r in chosen if r[column] is not None and r[column] == r[column]]
    return sorted(found, key=lambda item: (item[0], number_of(item[1])))


def number_of(value: object) -> float:
    return 0.0 if isinstance(value, str) else float(value)


def fits(aggregate: Aggregate, found: float, values: list[tuple[int, object]]) -> bool:
    """Whether `found` is the feature by its definition: to the bit, but for sums of fractions and estimates."""
    numbers = [number_of(value) for _at, value in values]
    function, whole = aggregate.function, aggregate.column != "ratio"
    if function == "count":
        return found == len(numbers)
    if function == "distinct":  # 4096 registers see so few values apart but for collisions
        return abs(found - len({value for _at, value in values})) <= 2
    if len(numbers) < (2 if function == "std" else 1):
        return math.isnan(found)
    size = max(map(abs, numbers))
    match function:
        case "sum":
            return (
                found == sum(numbers)
                if whole
                else math.isclose(found, math.fsum(numbers), rel_tol=0, abs_tol=1e-13 * size * len(numbers))
            )
        case "mean":
            return (
                found == sum(numbers) / len(numbers)
                if whole
                else math.isclose(found, math.fsum(numbers) / len(numbers), rel_tol=0, abs_tol=1e-13 * size)
            )
        case "min" | "max":
            return found == (min if function == "min" else max)(numbers)
        case "first" | "last":
            return found == numbers[0 if function == "first" else -1]
        case "std" | "var_pop":
            if size > 1e150:  # squares overflow
                return True
            exact = statistics.stdev(numbers) if function == "std" else statistics.pvariance(numbers)
            floor = 1e-12 * size if function == "std" else 1e-12 * size * size
            return math.isclose(found, exact, rel_tol=1e-9, abs_tol=floor)
    exact = sorted(numbers)[math.floor(quantile_of(function) * (len(numbers) - 1))]
    return abs(found - exact) <= abs(exact) / 128 and min(numbers) <= found <= max(numbers)


def newest(view: LatestView, rows: list[dict], at: int, keys: dict) -> list[float]:
    (key,) = view.join_keys
    found = [r for r in rows if r[key] == keys[key] and r["at"] <= at] if keys[key] is not None else []
    clean = [(r["at"], tuple(None if r[c] is None or r[c] != r[c] else r[c] for c in view.features)) for r in found]
    best = max(clean, key=lambda item: (item[0], order_of(item[1])), default=None)
    if best is None or (view.ttl_us and at - best[0] > view.ttl_us):
        return [math.nan] * len(view.features)
    return [math.nan if v is None else float(v) for v in best[1]]


def check_by_definition(found: list[float], rows: list[dict], at: int, keys: dict) -> None:
    """Each feature of a vector is what the plain reading of its definition gives, one event at a time."""
    values = iter(found)
    for view in WINDOW_VIEWS:
        for aggregate in view.aggregates:
            value = next(values)
            if None in [keys[key] for key in view.join_keys]:
                assert math.isnan(value)
                continue
            counted = values_of(view, aggregate, rows, at, keys)
            assert fits(aggregate, value, counted), (view.name, aggregate, value, counted)
    assert same(list(values), newest(NEWEST, rows, at, keys) + newest(FOREVER, rows, at, keys))


def same(left: list[float], right: list[float]) -> bool:
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(left, right, strict=True))


ROUNDED = frozenset(
    f"{v.name}__{a.feature}"
    for v in WINDOW_VIEWS
    for a in v.aggregates
    if a.function in {"std", "var_pop"} or (a.function in {"sum", "mean"} and a.column == "ratio")
)
"""Features whose last bits depend on the order of additions."""


def check_same(online: list[float], offline: list[float], scale: float) -> None:
    """Two places give the same bits, and sums of fractions to within rounding."""
    for name, a, b in zip(PLAN.features, online, offline, strict=True):
        if name in ROUNDED and max(abs(a), abs(b)) < 1e290:
            near = math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12 * scale * (scale if "var" in name else 1))
            assert near or (math.isnan(a) and math.isnan(b)), (name, a, b)
        elif name not in ROUNDED:
            assert a == b or (math.isnan(a) and math.isnan(b)), (name, a, b)


class Pipeline:
    """The stream side, restartable: what the worker does without its loop."""

    def __init__(self, make_store: Callable[[], OnlineStore], contents: Mapping[str, Content] | None = None) -> None:
        self._make_store = make_store
        self._contents = contents or {}
        self.runner = asyncio.Runner()
        self.restart()

    def restart(self) -> None:
        self.store = self._make_store()
        views = {view.group: view for view in DEFINITIONS.views}
        if not self.store.groups():
            for view in views.values():
                assert self.store.reserve(view, -1)
                self.store.fill(view, self._contents.get(view.group, []), version=-1, followed=None)
        self.store.open(views.values())
        self.serving = Serving(self.store, read_behind_us=10**15, head_behind_us=10**15, reader_of=lambda *_: None)
        self.serving.activate(DEFINITIONS)

    def close(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    def apply(self, *messages: Message) -> None:
        reading = read_messages(messages, self.store.seen)
        cuts, followed = self.store.groups(), self.store.followed()
        change = plan_change(reading, DEFINITIONS, cuts=cuts, followed=followed, until_us=1 << 62)
        self.store.apply(replace(change, starts=dict(self.store.positions())))


def from_lake(lake: Lake, version: int, oldest_us: int) -> dict[str, Content]:
    """What a fill puts into each group; heads reach back to the oldest question."""
    with lake.query({"events": version}) as query:
        return {
            view.group: query.rows(view, None)
            if isinstance(view, LatestView)
            else tiles_to_fill(query, view, None, oldest_us)
            for view in DEFINITIONS.views
        }


STORES = pytest.mark.parametrize("store_kind", ["embedded", pytest.param("redis", marks=pytest.mark.redis)])
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
"""Examples are small as they are; shrinking one would take longer than CI has."""
SLACK = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@pytest.fixture
def open_store(store_kind: str, request: pytest.FixtureRequest) -> Callable[[Path], Callable[[], OnlineStore]]:
    """Makes what opens the same store again and again; another one for another folder."""
    url = request.getfixturevalue("redis_url") if store_kind == "redis" else ""

    def of(folder: Path) -> Callable[[], OnlineStore]:
        if url:
            chosen = RedisSettings(url=url, prefix=f"{folder.parent.name}{folder.name}:", read_timeout_s=5)
            return lambda: RedisOnlineStore(chosen)
        folder.mkdir(exist_ok=True)
        return lambda: EmbeddedOnlineStore(folder / "online.sqlite")

    return of


@STORES
@settings(max_examples=8, deadline=None, phases=PHASES, suppress_health_check=SLACK)
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
        oldest = min(at for at, _user, _shop in given_asks)
        contents = from_lake(lake, len(given_batches) - 1, oldest)
        filled = Pipeline(open_store(root / "filled"), contents)
        service, other = pipeline.serving.service("s").service, filled.serving.service("s").service
        scale = max(abs(v) for r in rows for v in (r["amount"] or 0, r["ratio"] or 0, 1) if not math.isnan(v))
        for i, (at, user, shop) in enumerate(given_asks):
            keys = {"user": user, "shop": shop}
            (vector,) = pipeline.runner.run(pipeline.serving.read(service, [keys], at))
            check_by_definition(vector.values, rows, at, keys)
            trained = [offline[i][name] for name in PLAN.features]
            check_by_definition(trained, rows, at, keys)
            check_same(vector.values, trained, scale)
            (vector,) = filled.runner.run(filled.serving.read(other, [keys], at))
            check_same(vector.values, trained, scale)
        filled.close()
        pipeline.close()


@STORES
@settings(max_examples=10, deadline=None, phases=PHASES, suppress_health_check=SLACK)
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
            pipeline.store.prune(view, bound, bound)
        service = pipeline.serving.service("s").service
        for _ in range(2):
            for at in (bound, bound + behind * MINUTE_US):
                for user, shop in (("a", 1), ("b", 2), ("a\x1f", 1)):
                    keys = {"user": user, "shop": shop}
                    (vector,) = pipeline.runner.run(pipeline.serving.read(service, [keys], at))
                    check_by_definition(vector.values, rows, at, keys)
            pipeline.runner.run(pipeline.store.close())
            pipeline.restart()
        pipeline.close()


def test_a_fresh_head_is_asked_no_further_back_than_it_is_kept(tmp_path: Path) -> None:
    pipeline = Pipeline(lambda: EmbeddedOnlineStore(tmp_path / "online.sqlite"))
    row = {"at": BASE_US, "user": "a", "shop": 1, "amount": 1, "flag": None, "text": None, "ratio": None, "late": None}
    pipeline.apply(message(table_of([row]), 1, 0, 0))
    serving = Serving(pipeline.store, read_behind_us=10**15, head_behind_us=MINUTE_US, reader_of=lambda *_: None)
    serving.activate(DEFINITIONS)
    service = serving.service("s").service
    keys = [{"user": "a", "shop": 1}]
    assert len(pipeline.runner.run(serving.read(service, keys, BASE_US - MINUTE_US))) == 1
    with pytest.raises(FailedPreconditionError, match="head_behind_s"):
        pipeline.runner.run(serving.read(service, keys, BASE_US - MINUTE_US - 1))
    pipeline.close()


def test_a_reader_gives_empty_windows_for_an_unknown_entity() -> None:
    reader = WindowReader(WINDOWED)
    assert [v for v in reader.empty if not math.isnan(v)] == [0.0] * 2 * len(COLUMNS) * len(WINDOWS_US)
    assert all(math.isnan(v) for v in reader.missing)


def test_nonsense_registries_are_refused() -> None:
    from millrace_kit.errors import InvalidArgumentError

    for content in (b"\x00", b"\x0a\x02\x0a\x00", b"\x12\x34"):
        with pytest.raises(InvalidArgumentError, match="feast_registry"):
            compile_registry("p", content)
