"""Applying a fitted transformer beside scikit-learn's own pipeline of the same steps, in one process: one row, as a read has it, and many.

`make perf AREA=transformers`. Both are checked to give the same numbers first.
"""

import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from millrace_feature.transformers.applying import transformed
from millrace_feature.transformers.artifact import Artifact, specification
from millrace_feature.transformers.fitting import fit
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import KBinsDiscretizer, OneHotEncoder, StandardScaler

from tests.perf.harness import Contestant, Ratio, median, quantile, report

ROWS = 20_000
MANY = 1_000
ROUNDS = 5
NUMBERS = [f"v__n{i}" for i in range(10)]
START = datetime(2024, 1, 1, tzinfo=UTC)


def rows() -> pa.Table:
    """A training set: ten numbers with gaps, two of them binned, and two texts."""
    rng = np.random.default_rng(1)
    columns: dict[str, Any] = {
        "event_time": pa.array([START + timedelta(seconds=i) for i in range(ROWS)], pa.timestamp("us", tz="UTC")),
        "id": np.arange(ROWS),
    }
    for name in NUMBERS:
        columns[name] = pa.array(rng.normal(5, 3, ROWS), mask=rng.random(ROWS) < 0.05)
    columns["v__b0"], columns["v__b1"] = rng.normal(size=ROWS), rng.normal(size=ROWS)
    columns["v__shop"] = [f"s{i}" for i in rng.integers(0, 30, ROWS)]
    columns["v__city"] = [f"c{i}" for i in rng.integers(0, 12, ROWS)]
    columns["late"] = rng.random(ROWS) < 0.3
    return pa.table(columns)


def ours(table: pa.Table) -> Artifact:
    """The steps as a transformer."""
    steps = [
        specification(0, "impute", NUMBERS, "", {"strategy": "mean"}),
        specification(1, "standard", NUMBERS, "", {}),
        specification(2, "bin", ["v__b0", "v__b1"], "", {"bins": 8}),
        specification(3, "onehot", ["v__shop", "v__city"], "", {}),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.parquet"
        pq.write_table(table, path)
        return fit(path, steps, training_set="0" * 64, join_column="id", label_column="late")


def theirs(frame: pd.DataFrame) -> ColumnTransformer:
    """The same steps as a pipeline."""
    bins = KBinsDiscretizer(8, encode="ordinal", quantile_method="averaged_inverted_cdf", subsample=None)
    columns = [
        ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), NUMBERS),
        ("bins", bins, ["v__b0", "v__b1"]),
        ("texts", OneHotEncoder(sparse_output=False, handle_unknown="ignore"), ["v__shop", "v__city"]),
    ]
    return ColumnTransformer(columns, sparse_threshold=0).fit(frame)


def measured(name: str, work: Callable[[], object], calls: int) -> Contestant:
    """`calls` calls: rate, processor time of each and how long they took."""
    work()
    walls = []
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        at = time.perf_counter()
        work()
        walls.append((time.perf_counter() - at) * 1000)
    cpu_ms, wall = (time.process_time() - cpu) * 1000 / calls, time.perf_counter() - started
    walls.sort()
    return Contestant(name, calls / wall, cpu_ms, median(walls), quantile(walls, 0.99))


def main() -> None:
    """Measure and report."""
    table = rows()
    frame = table.to_pandas()
    artifact, pipeline = ours(table), theirs(frame)
    given = {name: table.column(name).to_pylist() for name in artifact.inputs}
    found = np.stack([*transformed(artifact, given).values()], axis=1)
    if not np.allclose(found, pipeline.transform(frame), rtol=1e-9, atol=1e-9):
        raise RuntimeError("the two give other answers")
    results: list[Contestant] = []
    ratios: list[Ratio] = []
    for count, calls in ((1, 400), (MANY, 40)):
        part = {name: values[:count] for name, values in given.items()}
        some = frame.iloc[:count]
        work = {
            "transformer": lambda part=part: transformed(artifact, part),
            "scikit-learn": lambda some=some: pipeline.transform(some),
        }
        runs = {
            name: [measured(f"{name}, {count} rows", one, calls) for _ in range(ROUNDS)] for name, one in work.items()
        }
        middle = {name: sorted(found, key=lambda r: r.cpu_ms_per_request)[ROUNDS // 2] for name, found in runs.items()}
        results += middle.values()
        ratio = middle["transformer"].cpu_ms_per_request / middle["scikit-learn"].cpu_ms_per_request
        ratios.append(Ratio.at_most(f"cpu over scikit-learn's, {count} rows", ratio, 0.2 if count == 1 else 1.0))
    report("transformers", results, ratios)


if __name__ == "__main__":
    main()
