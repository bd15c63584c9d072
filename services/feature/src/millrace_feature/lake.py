"""Reading the lake: Delta tables at exact versions, through DuckDB.

Plain tiles and rows are computed by SQL over all rows here and by numpy over micro-batches in the stream; a property test holds both to the
same values. Tiles with more in them are made by the stream's code. Sums of fractions are added in a fixed order (event time, then value),
so a rebuild gives the same bits.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from millrace_kit.content import lake_options
from millrace_kit.errors import FailedPreconditionError, NotFoundError, UnavailableError

from millrace_feature.cells import Cells
from millrace_feature.functions import Schema
from millrace_feature.metrics import BAD_VECTORS
from millrace_feature.plan import LatestView, WindowView
from millrace_feature.rows import Row, pick_rows
from millrace_feature.tiles import Ints, Stats, Tiles, all_tiles, encode_key, reduce_rows
from millrace_feature.vectors import packed_columns

NO_TABLE = -1
PLAIN_FEATURES = frozenset({"timestampNtz"})
"""Features of Delta's protocol that leave the files of a table plain Parquet with all its rows."""
TILE_ROWS = 1_000_000
"""Rows made into tiles at once."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one DuckDB connection may use."""

    memory_mib: int
    threads: int
    spill_dir: Path


def quoted(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _unavailable(contract: str, error: Exception) -> UnavailableError:
    message = f"the lake did not answer for table {contract!r}: {type(error).__name__}"
    return UnavailableError("LAKE_UNAVAILABLE", message, {"table": contract})


class Lake:
    """The tables below one URL."""

    def __init__(self, url: str, limits: Limits) -> None:
        self._url = url.rstrip("/")
        self._options = lake_options(self._url) or None
        self._limits = limits

    def newest_version(self, contract: str) -> int:
        """Newest version of the table; `NO_TABLE` when there is none yet.

        Raises:
            UnavailableError: the lake does not answer.
        """
        try:
            return int(DeltaTable(f"{self._url}/{contract}", storage_options=self._options).version())
        except TableNotFoundError:
            return NO_TABLE
        except (DeltaError, OSError) as error:
            raise _unavailable(contract, error) from error

    def open(self, contract: str, version: int) -> Any:
        """The table at `version` as a pyarrow dataset.

        Raises:
            NotFoundError: the table has no such version.
            UnavailableError: the lake does not answer, or no longer has what that version needs.
        """
        return self._open(contract, version)[1]

    def _open(self, contract: str, version: int) -> tuple[Any, Any]:
        try:
            table = DeltaTable(f"{self._url}/{contract}", version=version, storage_options=self._options)
            return table, table.to_pyarrow_dataset()
        except (TableNotFoundError, DeltaError, OSError) as error:
            if self.newest_version(contract) >= version >= 0:  # a log entry that is there could not be read
                raise _unavailable(contract, error) from error
            raise NotFoundError("table version", f"{contract}@{version}") from None

    @contextlib.contextmanager
    def query(self, versions: Mapping[str, int]) -> Iterator["Query"]:
        """A DuckDB connection that sees each table of `versions` under its name."""
        self._limits.spill_dir.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "memory_limit": f"{self._limits.memory_mib}MiB",
            "threads": self._limits.threads,
            "temp_directory": str(self._limits.spill_dir),
        }
        connection = duckdb.connect(":memory:", config=config)
        # A join holds its right side in memory, as it is written; DuckDB does not know how large a dataset of Arrow's is.
        connection.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
        try:
            columns = {}
            for contract, version in versions.items():
                table, dataset = self._open(contract, version)
                if not _scan_files(connection, contract, table, dataset.schema):
                    connection.register(f"lake_{contract}", dataset)
                columns[contract] = {field.name: field.type for field in dataset.schema}
            yield Query(connection, columns)
        except (OSError, duckdb.IOException) as error:
            raise _unavailable(", ".join(versions), error) from error
        finally:
            connection.close()


def _scan_files(connection: Any, contract: str, table: Any, schema: pa.Schema) -> bool:
    """Let DuckDB read a table's files itself, in half the memory and time that it takes through Arrow; False where it cannot.

    It can where the files lie on this machine and hold whole rows. A column that only newer files have is null in older ones.
    """
    protocol, files = table.protocol(), table.file_uris()
    features = set(protocol.reader_features or ()) - PLAIN_FEATURES
    if not files or features or table.metadata().partition_columns or not all(f.startswith("/") for f in files):
        return False
    listed = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
    scan = f"read_parquet([{listed}], union_by_name = true)"
    present = {row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()}
    empty = [field for field in schema if field.name not in present]
    if any(pa.types.is_nested(field.type) for field in empty):
        return False
    for field in empty:
        connection.register(f"lake_{contract}_{field.name}", pa.table({"v": pa.nulls(0, field.type)}))
    columns = [
        quoted(f.name)
        if f.name in present
        else f"(SELECT v FROM {quoted(f'lake_{contract}_{f.name}')}) AS {quoted(f.name)}"
        for f in schema
    ]
    connection.execute(f"CREATE TEMP VIEW lake_{contract} AS SELECT {', '.join(columns)} FROM {scan}")
    return True


class Query:
    """SQL over some tables at fixed versions."""

    def __init__(self, connection: Any, columns: Mapping[str, Mapping[str, pa.DataType]]) -> None:
        self.connection = connection
        self.columns = dict(columns)
        self._serial = itertools.count()

    def interrupt(self) -> None:
        """Stop the running statement, from another thread."""
        self.connection.interrupt()

    def arrow(self, sql: str) -> pa.Table:
        """The result of `sql` as a table."""
        return self.connection.sql(sql).to_arrow_table()

    def one(self, sql: str) -> tuple[Any, ...]:
        """The only row of the result of `sql`. DuckDB refuses the next statement until a result is read to its end."""
        (row,) = self.connection.execute(sql).fetchall()
        return tuple(row)

    def run(self, sql: str) -> None:
        """Run a statement without a result."""
        self.connection.execute(sql).fetchall()

    def reader(self, sql: str, rows: int) -> Any:
        """The result of `sql` in batches of about `rows`, which must be read to the end."""
        return self.connection.sql(sql).to_arrow_reader(rows)

    @contextlib.contextmanager
    def temporary(self, content: pa.Table) -> Iterator[str]:
        """Name of a table with `content`, while the context is open."""
        name = f"temporary_{next(self._serial)}"
        self.connection.register(f"{name}_content", content)
        try:
            self.run(f"CREATE TEMP TABLE {name} AS SELECT * FROM {name}_content")
        finally:
            self.connection.unregister(f"{name}_content")
        try:
            yield name
        finally:
            with contextlib.suppress(duckdb.Error):
                self.run(f"DROP TABLE {name}")

    @contextlib.contextmanager
    def part(self, contract: str, condition: str) -> Iterator[str]:
        """Name of a contract that holds the rows of `contract` for which `condition` is true, while the context is open."""
        name = f"{contract}_part_{next(self._serial)}"
        self.run(f"CREATE TEMP VIEW lake_{name} AS SELECT * FROM lake_{contract} WHERE {condition}")
        self.columns[name] = self.columns[contract]
        try:
            yield name
        finally:
            del self.columns[name]
            with contextlib.suppress(duckdb.Error):
                self.run(f"DROP VIEW lake_{name}")

    def count(self, contract: str, event_time: str, since_us: int | None) -> int:
        """Rows with an event time from `since_us`; all with None."""
        where = f"WHERE epoch_us({quoted(event_time)}) >= {since_us}" if since_us is not None else ""
        return int(self.one(f"SELECT count(*) FROM lake_{contract} {where}")[0])

    def need(self, contract: str, columns: Sequence[str], who: str) -> None:
        """Raises FailedPreconditionError unless the table has all `columns`."""
        missing = [name for name in columns if name not in self.columns[contract]]
        if missing:
            message = f"{who} needs column {missing[0]!r}, which table {contract!r} does not have"
            raise FailedPreconditionError(
                "COLUMN_MISSING", message, {"table": contract, "column": missing[0], "for": who}
            )

    def stats(self, contract: str, event_time: str, *, until_us: int) -> tuple[int, int | None]:
        """(rows, newest event time in microseconds not after `until_us`)."""
        self.need(contract, [event_time], f"contract {contract}")
        at = f"epoch_us({quoted(event_time)})"
        sql = f"SELECT count(*) AS n, max({at}) FILTER ({at} <= {until_us}) AS newest FROM lake_{contract}"
        # As a whole table: DuckDB refuses the next statement while a result is not read to its end.
        rows, newest = self.arrow(sql).to_pylist()[0].values()
        return int(rows), int(newest) if newest is not None else None

    def _number(self, contract: str, column: str) -> str:
        """The column as DOUBLE, NaN as NULL; 0 per value for a column that is no number."""
        kind, name = self.columns[contract][column], quoted(column)
        if pa.types.is_floating(kind):
            return f"CASE WHEN isnan({name}) THEN NULL ELSE {name}::DOUBLE END"
        if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
            return f"{name}::DOUBLE"
        return f"CASE WHEN {name} IS NULL THEN NULL ELSE 0::DOUBLE END"

    def tiles(self, view: WindowView, since_us: int | None, before_us: int | None, unit_us: int | None = None) -> Tiles:
        """The view's tiles from rows with event time in [since, before), sorted by (code, hop).

        Args:
            view: the windows.
            since_us: oldest event time, on an edge of tiles; None for all.
            before_us: None for all.
            unit_us: width of a tile; the view's finest when None.
        """
        self.need(view.contract, view.source_columns, f"view {view.name}")
        unit_us = unit_us or view.step_us
        at = f"epoch_us({quoted(view.event_time)})"
        wanted = [f"{quoted(c)} IS NOT NULL" for c in (view.event_time, *view.join_keys)]
        wanted += [f"{at} >= {since_us}"] if since_us is not None else []
        wanted += [f"{at} < {before_us}"] if before_us is not None else []
        if view.late_us:
            arrived = quoted(view.arrived_at)
            wanted.append(f"({arrived} IS NULL OR epoch_us({arrived}) - {at} <= {view.late_us})")
        if view.schema.is_plain:
            return self._plain_tiles(view, " AND ".join(wanted), unit_us)
        return self._other_tiles(view, " AND ".join(wanted), unit_us)

    def _plain_tiles(self, view: WindowView, where: str, unit_us: int) -> Tiles:
        """Counts, sums and extremes, grouped by DuckDB."""
        at = f"epoch_us({quoted(view.event_time)})"
        inner, outer = [], []
        for i, column in enumerate(view.columns):
            inner.append(f"{self._number(view.contract, column)} AS v{i}")
            exact = not pa.types.is_floating(self.columns[view.contract][column])
            total = f"sum(v{i})" if exact else f"sum(v{i} ORDER BY at_us, v{i})"
            outer += [f"count(v{i})::DOUBLE AS n{i}", f"coalesce({total}, 0) AS s{i}"]
            outer += [f"coalesce(min(v{i}), 'inf'::DOUBLE) AS l{i}", f"coalesce(max(v{i}), '-inf'::DOUBLE) AS h{i}"]
        names = [f"k{i}" for i in range(len(view.join_keys))]
        chosen = ", ".join(f"{quoted(key)} AS {name}" for key, name in zip(view.join_keys, names, strict=True))
        # Integer division rounds towards zero, so hops before 1970 are shifted first.
        hop = f"(({at} - ((({at} % {unit_us}) + {unit_us}) % {unit_us})) // {unit_us})"
        table = self.arrow(
            f"SELECT {', '.join(names)}, hop, {', '.join(outer)} FROM "
            f"(SELECT {chosen}, {hop} AS hop, {at} AS at_us, {', '.join(inner)} FROM lake_{view.contract} "
            f"WHERE {where}) GROUP BY ALL ORDER BY {', '.join(names)}, hop"
        )
        return _to_tiles(table, names, view.schema, unit_us)

    def _other_tiles(self, view: WindowView, where: str, unit_us: int) -> Tiles:
        """Everything else, by the code of the stream over rows in a fixed order."""
        columns = list(dict.fromkeys([*view.join_keys, view.event_time, *view.columns]))
        chosen = ", ".join(map(quoted, columns))
        # One order for each snapshot, however its files are scanned, so that a rebuild gives the same bits.
        sql = f"SELECT {chosen} FROM lake_{view.contract} WHERE {where} ORDER BY {chosen}"
        reader = self.connection.sql(sql).to_arrow_reader(TILE_ROWS)
        parts = (
            reduce_rows(
                pa.Table.from_batches([batch]),
                keys=view.join_keys, event_time=view.event_time, schema=view.schema, unit_us=unit_us,
            )
            for batch in reader
        )  # fmt: skip
        return all_tiles(parts, view.schema, unit_us)

    def rows(self, view: LatestView, since_us: int | None) -> list[Row]:
        """The view's rows with event time from `since`, one per key and time."""
        columns = [view.event_time, *view.join_keys, *view.features]
        self.need(view.contract, columns, f"view {view.name}")
        where = f"WHERE epoch_us({quoted(view.event_time)}) >= {since_us}" if since_us is not None else ""
        chosen = ", ".join(quoted(c) for c in dict.fromkeys(columns))
        table = self.arrow(f"SELECT {chosen} FROM lake_{view.contract} {where}")
        table, bad = packed_columns(table, view.vectors)
        for feature, count in bad.items():
            BAD_VECTORS.labels(view.name, feature).inc(count)
        return pick_rows(table, keys=view.join_keys, event_time=view.event_time, columns=view.features)


def _to_tiles(table: pa.Table, names: Sequence[str], schema: Schema, unit_us: int) -> Tiles:
    columns = len(schema.columns)
    keys = list(zip(*(table.column(name).to_pylist() for name in names), strict=True))
    hops: Ints = np.asarray(table.column("hop").to_numpy(), dtype=np.int64)
    codes = np.zeros(len(keys), np.int64)
    distinct: list[str] = []
    last: tuple[Any, ...] | None = None
    for i, key in enumerate(keys):
        if key != last:
            distinct.append(encode_key(key))
            last = key
        codes[i] = len(distinct) - 1

    def stack(letter: str) -> Any:
        if not columns:
            return np.zeros((0, len(keys)))
        return np.stack([np.asarray(table.column(f"{letter}{i}").to_numpy(), np.float64) for i in range(columns)])

    none = np.zeros((0, len(keys)))
    stats = Stats(stack("n"), stack("s"), stack("l"), stack("h"), none, none, none, none, none)
    return Tiles(schema, unit_us, distinct, codes, hops, stats, Cells.none())
