"""Training sets: point-in-time features of labelled entity rows, from exact lake versions.

For an entity row at instant t every feature is what an online read at t would have given had every record arrived in event-time order:
windows end at the last complete slide before t (or, with a fresh head, at t), a newest row is at most as old as its view's TTL. Rows whose label is not known yet are left
out and counted; no labelled row is ever dropped, a missing feature is NaN.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from millrace_kit.errors import FailedPreconditionError, ResourceExhaustedError

from millrace_feature.lake import NO_TABLE, Lake, Query, quoted
from millrace_feature.plan import Definitions, LatestView, ServicePlan, ViewUse, WindowView
from millrace_feature.point_in_time import Entities, newest_features, windowed_features
from millrace_feature.rows import known
from millrace_feature.tiles import Floats
from millrace_feature.transforms import Labelled, TransformRunner, or_none
from millrace_feature.vector_fields import element_names
from millrace_feature.vectors import elements, unpacked

ROW_GROUP_ROWS = 65_536
TRANSFORM_ROWS = 8_192
USUAL_FEATURES = 64
"""Sets with more features, such as those with embeddings, are made in steps of fewer rows."""
NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Labels:
    """Which rows to build and what their label is. Instants are microseconds since the epoch; None is unbounded."""

    entity_contract: str
    label_contract: str
    join_column: str
    label_column: str
    start_us: int | None
    end_us: int | None
    known_at_us: int | None


@dataclass(frozen=True, slots=True)
class Built:
    """A finished data file."""

    path: Path
    rows: int
    rows_without_label: int


def contracts_of(plan: ServicePlan, definitions: Definitions, labels: Labels) -> list[str]:
    """Every table a build reads, sorted."""
    views = {definitions.view(use.view).contract for use in plan.uses}
    return sorted({labels.entity_contract, labels.label_contract, *views})


def carried_names(plan: ServicePlan) -> list[str]:
    """Join keys and request fields of the service: what an entity row brings along."""
    return list(dict.fromkeys([*plan.join_keys, *(name for name, _kind in plan.request_fields)]))


class Build:
    """One run; `cancel` may be called from another thread."""

    def __init__(
        self,
        lake: Lake,
        plan: ServicePlan,
        definitions: Definitions,
        labels: Labels,
        *,
        max_rows: int,
        rows_at_once: int = 16 * ROW_GROUP_ROWS,
    ) -> None:
        self._lake = lake
        self._plan = plan
        self._definitions = definitions
        self._labels = labels
        self._max_rows = max_rows
        fitting = rows_at_once * USUAL_FEATURES // max(USUAL_FEATURES, len(plan.features))
        self._rows_at_once = max(1, -(-fitting // ROW_GROUP_ROWS)) * ROW_GROUP_ROWS
        """Whole row groups, so that the file does not depend on it."""
        self._lock = threading.Lock()
        self._query: Query | None = None
        self._cancelled = False
        self._carried: list[str] = []
        self._is_labelled = False
        self._known: dict[tuple[str, ...], Entities] = {}
        self._others: dict[str, Any] = {}
        """Features of the rows at hand that are no numbers, by full name."""

    def cancel(self) -> None:
        """Stop as soon as possible; `run` then raises."""
        with self._lock:
            self._cancelled = True
            if self._query is not None:
                self._query.interrupt()

    @contextlib.contextmanager
    def _open(self, versions: Mapping[str, int]) -> Iterator[Query]:
        with self._lake.query(versions) as query:
            with self._lock:
                if self._cancelled:
                    raise InterruptedError("the build was cancelled")
                self._query = query
            try:
                yield query
            finally:
                with self._lock:
                    self._query = None

    def run(self, versions: Mapping[str, int], target: Path) -> Built:
        """Write the Parquet file to `target`: event_time, join column, features in vector order, label.

        Raises:
            FailedPreconditionError: a table is missing or lacks a column, or a transform failed.
            ResourceExhaustedError: more rows than `max_rows`.
            NotFoundError: a table has no such version.
        """
        for contract, version in versions.items():
            if version == NO_TABLE:
                raise FailedPreconditionError(
                    "TABLE_MISSING", f"table {contract!r} does not exist yet", {"table": contract}
                )
        with self._open(versions) as query:
            rows, without = self._collect(query)
            with contextlib.ExitStack() as stack:
                writer: pq.ParquetWriter | None = None
                for start in range(0, max(rows, 1), self._rows_at_once):
                    chosen = f"row_id >= {start} AND row_id < {start + self._rows_at_once}"
                    entities = query.arrow(f"SELECT * FROM labels WHERE {chosen} ORDER BY row_id")
                    table = self._table(entities, self._features(query, entities))
                    if writer is None:
                        writer = stack.enter_context(_writer(target, table.schema))
                    writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        return Built(target, rows, without)

    def features(self, versions: Mapping[str, int], rows: pa.Table) -> dict[str, Floats]:
        """See `features_at`."""
        self._carried = carried_names(self._plan)
        with self._open(versions) as query:
            return self._features(query, rows)

    def columns(self, versions: Mapping[str, int], rows: pa.Table) -> dict[str, Any]:
        """The same with texts and times: numbers as float64 arrays, everything else as Arrow columns."""
        found: dict[str, Any] = dict(self.features(versions, rows))
        return {**found, **self._others}

    def _collect(self, query: Query) -> tuple[int, int]:
        """Make table `labels`, one row per labelled entity row in its final order; returns (rows, rows without a label)."""
        spec = self._labels
        time = self._definitions.event_time(spec.entity_contract)
        label_time = self._definitions.event_time(spec.label_contract)
        for contract, column in ((spec.entity_contract, time), (spec.label_contract, label_time)):
            if column is None:
                message = f"the definitions have no data source named {contract!r}, so its event time is not known"
                raise FailedPreconditionError("SOURCE_MISSING", message, {"contract": contract})
        assert time is not None
        assert label_time is not None
        carried = carried_names(self._plan)
        query.need(spec.entity_contract, [time, spec.join_column, *carried], f"feature service {self._plan.name}")
        query.need(spec.label_contract, [label_time, spec.join_column, spec.label_column], "the label")
        at = f"epoch_us(e.{quoted(time)})"
        wanted = [f"e.{quoted(time)} IS NOT NULL", f"e.{quoted(spec.join_column)} IS NOT NULL"]
        wanted += [f"{at} >= {spec.start_us}"] if spec.start_us is not None else []
        wanted += [f"{at} < {bound}" for bound in (spec.end_us, spec.known_at_us) if bound is not None]
        label_at = f"epoch_us({quoted(label_time)})"
        known_labels = f"WHERE {label_at} < {spec.known_at_us}" if spec.known_at_us is not None else ""
        join, label = quoted(spec.join_column), quoted(spec.label_column)
        columns = "".join(f", e.{quoted(name)} AS in{i}" for i, name in enumerate(carried))
        # A label written twice: the later event wins, then the greater value.
        query.run(
            f"CREATE TEMP TABLE joined AS SELECT {at} AS at_us, e.{join} AS join_value{columns}, l.label AS label "
            f"FROM lake_{spec.entity_contract} AS e LEFT JOIN (SELECT {join} AS j, {label} AS label "
            f"FROM lake_{spec.label_contract} {known_labels} QUALIFY row_number() OVER (PARTITION BY {join} "
            f"ORDER BY {quoted(label_time)} DESC, {label} DESC NULLS LAST) = 1) AS l ON l.j = e.{join} "
            f"WHERE {' AND '.join(wanted)}"
        )
        total, labelled = query.one("SELECT count(*), count(label) FROM joined")
        if labelled > self._max_rows:
            raise ResourceExhaustedError(
                "max_training_rows", f"{labelled} rows, at most {self._max_rows} fit one training set"
            )
        ties = ", ".join(["at_us", "join_value", "label", *(f"in{i}" for i in range(len(carried)))])
        query.run(
            f"CREATE TEMP TABLE labels AS SELECT row_number() OVER (ORDER BY {ties}) - 1 AS row_id, * "
            "FROM joined WHERE label IS NOT NULL"
        )
        query.run("DROP TABLE joined")
        self._carried = carried
        self._is_labelled = True
        return int(labelled), int(total - labelled)

    def _features(self, query: Query, entities: pa.Table) -> dict[str, Floats]:
        """Every feature of the vector by full name."""
        stored: dict[tuple[str, str], Any] = {}
        at = np.asarray(entities.column("at_us").to_numpy(), np.int64)
        self._known.clear()
        for use in self._plan.uses:
            view = self._definitions.view(use.view)
            keys, until_us = self._entities(use, entities), self._labels.known_at_us
            found: Mapping[str, Any]
            if isinstance(view, WindowView):
                found = windowed_features(query, view, keys, at, until_us)
            else:
                found = newest_features(query, view, keys, at, until_us)
            stored.update({(use.alias, name): column for name, column in found.items()})
        features = self._vector_elements(stored)
        features.update(
            (f"{alias}__{name}", _as_floats(column)) for (alias, name), column in stored.items() if _is_number(column)
        )
        self._others = {
            name: column
            for (alias, feature), column in stored.items()
            if (name := f"{alias}__{feature}") in self._plan.features and not _is_number(column)
        }
        features.update(self._transformed(stored, entities))
        return features

    def _vector_elements(self, stored: dict[tuple[str, str], Any]) -> dict[str, Floats]:
        """The numbers of embeddings that the vector holds, by full name; what is stored of them becomes lists."""
        wanted = set(self._plan.features)
        found: dict[str, Floats] = {}
        for use in self._plan.uses:
            view = self._definitions.view(use.view)
            for field in view.vectors if isinstance(view, LatestView) else ():
                place = (use.alias, field.feature)
                names = element_names(f"{use.alias}__{field.feature}", field)
                if not wanted.isdisjoint(names):
                    numbers = elements(stored[place], field)
                    found.update((name, numbers[i]) for i, name in enumerate(names) if name in wanted)
                stored[place] = unpacked(stored[place], field)
        return found

    def _entities(self, use: ViewUse, rows: pa.Table) -> Entities:
        if use.keys not in self._known:
            columns = [rows.column(f"in{self._carried.index(name)}") for name in use.keys]
            self._known[use.keys] = Entities.of(columns)
        return self._known[use.keys]

    def _transformed(self, stored: Mapping[tuple[str, str], Any], entities: pa.Table) -> dict[str, Floats]:
        """Outputs of the on-demand views, computed on slices of columns by the functions that serve."""
        runners = [TransformRunner(transform) for transform in self._plan.transforms]
        wanted = {pair for runner in runners for pair in runner.plan.inputs if pair in stored}
        times_us = entities.column("at_us").to_numpy()
        parts: dict[str, list[Sequence[float]]] = {}
        for start in range(0, entities.num_rows, TRANSFORM_ROWS):
            if self._cancelled:
                raise InterruptedError("the build was cancelled")
            rows = min(TRANSFORM_ROWS, entities.num_rows - start)
            inputs: dict[tuple[str, str], Sequence[Any]] = {pair: _values(stored[pair], start, rows) for pair in wanted}
            labelled = None
            if self._is_labelled:
                labelled = Labelled(
                    entities.column("join_value").slice(start, rows).to_pylist(),
                    times_us[start : start + rows].tolist(),
                )
            request = {
                name: [
                    known(v) for v in entities.column(f"in{self._carried.index(name)}").slice(start, rows).to_pylist()
                ]
                for name, _kind in self._plan.request_fields
            }
            for runner in runners:
                made = runner.placed(runner.run(inputs, request, rows, labelled))
                inputs.update(made)
                for (view, output), column in made.items():
                    parts.setdefault(f"{view}__{output}", []).append(column)
        empty = {f"{t.name}__{o}": np.zeros(0) for t in self._plan.transforms for o in t.outputs}
        return {**empty, **{name: np.concatenate([np.array(p) for p in columns]) for name, columns in parts.items()}}

    def _table(self, entities: pa.Table, features: Mapping[str, Floats]) -> pa.Table:
        at = entities.column("at_us").cast(pa.timestamp("us", tz="UTC"))
        columns: dict[str, Any] = {"event_time": at, self._labels.join_column: entities.column("join_value")}
        for name in self._plan.features:
            columns[name] = self._others[name] if name in self._others else pa.array(features[name], pa.float64())
        columns[self._labels.label_column] = entities.column("label")
        return pa.table(columns)


def _writer(target: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet file whose bytes depend on its content alone, however many steps it is written in."""
    return pq.ParquetWriter(target, schema, compression="zstd", use_dictionary=True, store_schema=False)


def features_at(
    lake: Lake, plan: ServicePlan, definitions: Definitions, rows: pa.Table, versions: Mapping[str, int]
) -> dict[str, Floats]:
    """Every feature of the vector for rows that the caller gives, by full name: what a training set would hold for them.

    Args:
        lake: where the views' tables are.
        plan: the feature service.
        definitions: what `plan` is part of.
        rows: `at_us` (instant, microseconds since the epoch), then `in0`… with the values of `carried_names(plan)`.
        versions: exact version of every table the service's views read.
    """
    labels = Labels("", "", "", "", start_us=None, end_us=None, known_at_us=None)
    return Build(lake, plan, definitions, labels, max_rows=rows.num_rows).features(versions, rows)


def _is_number(column: Any) -> bool:
    if isinstance(column, np.ndarray):
        return True
    kind = column.type
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    )


def _as_floats(column: Any) -> Floats:
    if isinstance(column, np.ndarray):
        return column
    return np.asarray(column.cast(pa.float64(), safe=False).fill_null(NAN).to_numpy(), np.float64)


def _values(column: Any, start: int, rows: int) -> list[Any]:
    if isinstance(column, np.ndarray):
        return [or_none(value) for value in column[start : start + rows].tolist()]
    return [known(value) for value in column.slice(start, rows).to_pylist()]
