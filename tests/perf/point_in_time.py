"""Point-in-time training sets: the feature service's builder beside Feast's DuckDB store and the bare ASOF query. A request is a label.

Every contestant is a process of its own, so that its peak memory is its own, and reads the same Parquet files. The builder and the bare query
do the same work: join labels to entity rows, find each row's newest event of its entity, write Parquet ordered by time. Feast gets the
joined labels ready-made and writes nothing: its store returns a table. Feast's store needs ibis, which Millrace does not: it runs from a
virtual environment of its own in `build/perf/feast-venv`, made at the first run. The answers are compared.

`LABELS=1000000` measures the full size: ten events a label, as always, and about an hour for Feast on a busy machine of two cores.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LABELS = int(os.environ.get("LABELS", "100000"))
EVENTS_A_LABEL, LABELS_AN_ENTITY, FEATURES = 10, 10, 5
FILE_ROWS = 1_000_000
ROUNDS = 3
SPAN_US = 30 * 86_400_000_000
START = datetime(2024, 1, 1, tzinfo=UTC)
MEMORY_MIB = 2048
TIMES_FEAST, TIMES_ASOF = 10.0, 1.5
VENV = Path("build/perf/feast-venv")
NAMES = [f"f{i}" for i in range(FEATURES)]


def stamps(offsets_us: Any) -> pa.Array:
    """Instants in the month of the data."""
    return pa.array(np.int64(START.timestamp() * 1e6) + offsets_us, pa.timestamp("us", "UTC"))


def write_data(folder: Path, labels: int) -> None:
    """Delta tables of events, entity rows and outcomes, and the joined labels for Feast."""
    from deltalake import write_deltalake

    chance = np.random.default_rng(1)
    entities, events = labels // LABELS_AN_ENTITY, labels * EVENTS_A_LABEL
    for start in range(0, events, FILE_ROWS):
        rows = min(FILE_ROWS, events - start)
        columns = {"user": chance.integers(0, entities, rows), "at": stamps(chance.integers(0, SPAN_US, rows))}
        values = {name: chance.normal(size=rows) for name in NAMES}
        write_deltalake(str(folder / "lake/events"), pa.table({**columns, **values}), mode="append")
    at, users = stamps(chance.integers(0, SPAN_US, labels)), chance.integers(0, entities, labels)
    ids = np.arange(labels)
    write_deltalake(str(folder / "lake/asks"), pa.table({"id": ids, "user": users, "at": at}))
    outcomes = {"id": ids, "at": stamps(np.full(labels, SPAN_US)), "label": chance.integers(0, 2, labels).astype(float)}
    write_deltalake(str(folder / "lake/outcomes"), pa.table(outcomes))
    pq.write_table(
        pa.table({"user": users, "event_timestamp": at, "label": outcomes["label"]}), folder / "labels.parquet"
    )


def files(folder: Path, table: str) -> list[str]:
    """The table's data files."""
    return [str(path) for path in sorted((folder / "lake" / table).glob("*.parquet"))]


def checksum(table: pa.Table) -> list[float]:
    """What tells answers apart: rows, values that are there, and the sum of each feature."""
    import pyarrow.compute as pc

    columns = [pc.if_else(pc.is_nan(c), None, c) for c in (table.column(name).cast(pa.float64()) for name in NAMES)]
    present = sum(len(column) - column.null_count for column in columns)
    return [table.num_rows, present, *(round(float(pc.sum(column).as_py()), 6) for column in columns)]


def builder(folder: Path) -> Callable[[], pa.Table]:
    """The service's builder with its catalog and its content store."""
    import asyncio

    from millrace_api.feature.v1.feature_pb2 import BuildTrainingSetRequest
    from millrace_feature.builder import Builder
    from millrace_feature.catalog import Catalog
    from millrace_feature.compiler import compile_registry
    from millrace_feature.lake import Lake, Limits
    from millrace_feature.set_pins import SetPins
    from millrace_feature.settings import FeatureSettings
    from millrace_kit.clock import SystemClock
    from millrace_kit.content import ContentStore
    from millrace_kit.sql import open_engine

    settings = FeatureSettings(
        state_dir=str(folder / "state"), lake_url=str(folder / "lake"), training_sets_url=str(folder / "sets")
    )
    Path(settings.state_dir).mkdir(exist_ok=True)
    compiled = compile_registry("perf", registry(folder))
    catalog = Catalog(open_engine(f"sqlite:///{settings.state_dir}/feature.sqlite"))
    catalog.apply(compiled.definitions, compiled.registry, START)
    lake = Lake(settings.lake_url, Limits(settings.build_memory_mib, settings.build_threads, folder / "spill"))
    content = ContentStore(settings.training_sets_url)
    clock = SystemClock()
    pins = SetPins(None, catalog, settings.set_pins, clock)
    made = Builder(lake=lake, catalog=catalog, content=content, pins=pins, settings=settings, clock=clock)
    request = BuildTrainingSetRequest(
        feature_service="main",
        entity_contract="asks",
        label_contract="outcomes",
        join_column="id",
        label_column="label",
    )

    def run() -> pa.Table:
        answer = asyncio.run(made.build(request))
        table = pq.read_table(content.fetch(answer.data.sha256, folder / "set.parquet"))
        return table.rename_columns([name.removeprefix("view__") for name in table.column_names])

    return run


def objects(folder: Path) -> list[Any]:
    """Feast's definitions of the same."""
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
    from feast.data_format import ParquetFormat
    from feast.types import Float64, Int64

    def source(name: str) -> Any:
        path = str(folder / "lake" / name / "*.parquet")
        return FileSource(name=name, path=path, timestamp_field="at", file_format=ParquetFormat())

    user = Entity(name="user", join_keys=["user"], value_type=ValueType.INT64)
    fields = [Field(name="user", dtype=Int64), *[Field(name=name, dtype=Float64) for name in NAMES]]
    view = FeatureView(name="view", entities=[user], ttl=timedelta(days=365), schema=fields, source=source("events"))
    return [user, source("asks"), source("outcomes"), view, FeatureService(name="main", features=[view])]


def registry(folder: Path) -> bytes:
    """The definitions as a serialized Feast registry."""
    from feast.protos.feast.core.Registry_pb2 import Registry

    user, asks, outcomes, view, service = [item.to_proto() for item in objects(folder)]
    content = Registry(entities=[user], data_sources=[asks, outcomes], feature_views=[view], feature_services=[service])
    return bytes(content.SerializeToString())


def asof(folder: Path) -> Callable[[], pa.Table]:
    """The bare query."""
    import duckdb

    connection = duckdb.connect(
        config={"threads": 2, "memory_limit": f"{MEMORY_MIB}MiB", "temp_directory": str(folder)}
    )
    target = folder / "asof.parquet"

    def run() -> pa.Table:
        reads = {name: f"read_parquet({files(folder, name)!r})" for name in ("asks", "outcomes", "events")}
        chosen = ", ".join(f"e.{name}" for name in NAMES)
        connection.execute(
            f'COPY (SELECT a."at", a.id, {chosen}, o.label FROM {reads["asks"]} AS a JOIN {reads["outcomes"]} AS o USING (id) '
            f'ASOF LEFT JOIN {reads["events"]} AS e ON e."user" = a."user" AND a."at" >= e."at" ORDER BY a."at", a.id) '
            f"TO '{target}' (FORMAT parquet, COMPRESSION zstd)"
        )
        return pq.read_table(target)

    return run


def feast(folder: Path) -> Callable[[], pa.Table]:
    """Feast's DuckDB offline store."""
    from feast import FeatureStore, RepoConfig

    config = RepoConfig(
        project="perf",
        provider="local",
        registry=str(folder / "registry.db"),
        online_store={"type": "sqlite", "path": str(folder / "online.sqlite")},
        offline_store={"type": "duckdb"},
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    store.apply(objects(folder))
    labels = pq.read_table(folder / "labels.parquet").to_pandas()

    def run() -> pa.Table:
        job = store.get_historical_features(entity_df=labels, features=[f"view:{name}" for name in NAMES])
        return job.to_arrow()

    return run


CONTESTANTS = {"builder": builder, "asof": asof, "feast": feast}


@dataclass(frozen=True, slots=True)
class Run:
    """One contestant's figures."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    answer: list[float]


def contestant(name: str, folder: Path) -> None:
    """Be one contestant and print its figures."""
    work = CONTESTANTS[name](folder)
    cpu, started = time.process_time(), time.perf_counter()
    table = work()
    found = {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps({**found, "answer": checksum(table)}))


def measured(name: str, folder: Path) -> Run:
    """Run one contestant in a process of its own."""
    python = str(VENV / "bin/python") if name == "feast" else sys.executable
    command = [python, "-m", "tests.perf.point_in_time", name, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def make_venv() -> None:
    """Feast with its DuckDB store, as its users install it."""
    if not (VENV / "bin/python").exists():
        uv = str(Path(sys.executable).parent / "uv")
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(VENV)], check=True)
        packages = ["feast[duckdb,delta]==0.67.0", "psutil"]
        subprocess.run([uv, "pip", "install", "-q", "--python", str(VENV / "bin/python"), *packages], check=True)


def main() -> None:
    """Measure and report."""
    from tests.perf.harness import Contestant, Ratio, median, report

    make_venv()
    runs: dict[str, list[Run]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory(prefix="perf-") as name:
        folder = Path(name)
        write_data(folder, LABELS)
        rounds = ROUNDS if LABELS <= 100_000 else 1
        for number in range(rounds):
            for one in CONTESTANTS:
                runs[one].append(measured(one, folder))
                print(f"round {number + 1} of {rounds}: {one}: {runs[one][-1]}", file=sys.stderr)
    answers = {one: found[0].answer for one, found in runs.items()}
    for one, answer in answers.items():
        if not np.allclose(answer, answers["asof"], rtol=1e-9):
            raise RuntimeError(f"{one} gave other answers: {answers}")

    def middle(one: str, figure: str) -> float:
        return median([getattr(run, figure) for run in runs[one]])

    titles = {"builder": "feature service's builder", "asof": "bare ASOF query", "feast": "Feast's DuckDB store"}
    results = [
        Contestant(
            titles[one], LABELS / middle(one, "wall_s"), middle(one, "cpu_s") * 1000 / LABELS,
            middle(one, "wall_s") * 1000, max(run.wall_s for run in found) * 1000,
        )
        for one, found in runs.items()
    ]  # fmt: skip
    peaks = {one: max(run.peak_mib for run in found) for one, found in runs.items()}
    ratios = [
        Ratio.at_least("times Feast's speed", middle("feast", "wall_s") / middle("builder", "wall_s"), TIMES_FEAST),
        Ratio.at_least(
            "times Feast's speed, by cpu", middle("feast", "cpu_s") / middle("builder", "cpu_s"), TIMES_FEAST
        ),
        Ratio.at_most(
            "times the bare query's time", middle("builder", "wall_s") / middle("asof", "wall_s"), TIMES_ASOF
        ),
        Ratio.at_most("times the bare query's cpu", middle("builder", "cpu_s") / middle("asof", "cpu_s"), TIMES_ASOF),
        Ratio.at_most("peak memory, MiB", peaks["builder"], MEMORY_MIB),
        Ratio.at_most("peak memory over Feast's", peaks["builder"] / peaks["feast"], 1.0),
    ]
    report(f"point_in_time_{LABELS}", results, ratios)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        contestant(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
