"""One contract's Delta table: append with fencing, find commits again, follow the log.

Each append carries two kinds of application transactions: `WRITER`, whose version rises by one a commit, and one a source, whose
version is the source's last offset in the commit. delta-rs stores them and refuses a commit whose snapshot does not have the newest
transaction of the same application, so of two processes that write from one snapshot only one succeeds. `fence` uses that: it
commits nothing but the next `WRITER` version, after which no commit that an earlier process has under way can succeed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pa_dataset
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler
from deltalake.schema import ArrayType, Field, PrimitiveType
from millrace_kit.errors import NotFoundError, UnavailableError

from millrace_ingestion.contracts import OFFSET_COLUMN, SOURCE_COLUMN, Contract

WRITER = "millrace-ingestion"
GROUP_KEY = "millrace.group"
_SOURCE_PREFIX = "source:"
# Log files are kept for ever: training sets name versions, and a catch-up needs the versions since its own.
_CONFIGURATION = {"delta.enableExpiredLogCleanup": "false", "delta.checkpointInterval": "50"}
_DELTA_TYPES = {"string": "string", "int64": "long", "double": "double", "bool": "boolean"}


def _delta_type(kind: pa.DataType) -> PrimitiveType | ArrayType:
    if pa.types.is_list(kind):
        return ArrayType(PrimitiveType("float"), contains_null=True)
    return PrimitiveType(_DELTA_TYPES.get(str(kind), "timestamp"))


@dataclass(frozen=True)
class Commit:
    """One version of the table's log; `files` are those that brought new rows (a compaction brings none)."""

    version: int
    group_id: str
    files: tuple[str, ...]
    rows: int = 0
    at_s: float = 0.0
    """When it was committed, in seconds since the epoch."""


@dataclass(frozen=True)
class Snapshot:
    """A version of the table."""

    version: int
    rows: int
    lost: bool
    """Whether a file of it has been vacuumed, so that it cannot be read."""


@dataclass(frozen=True)
class LogEntry:
    """One version, as the log tells of it."""

    version: int
    at: datetime
    operation: str
    """Delta's name of what was done, for example WRITE or OPTIMIZE."""
    added_rows: int
    """Records that it brought; a compaction brings none."""


class LakeTable:
    """The table of one contract. Not thread-safe: its landing task uses it from one thread at a time.

    Args:
        url: folder of the table.
        options: options of the object store.
        compact_target_bytes: files at least this large are not compacted.
    """

    def __init__(self, url: str, options: Mapping[str, str], *, compact_target_bytes: int) -> None:
        self.url = url
        self._options = dict(options) or None
        self._compact_target_bytes = compact_target_bytes
        self._table: DeltaTable | None = None
        self._files: pa_fs.FileSystem | None = None
        self._properties = WriterProperties(compression="SNAPPY")

    @property
    def _open_table(self) -> DeltaTable:
        assert self._table is not None, "open comes first"
        return self._table

    @property
    def version(self) -> int:
        """Newest version this snapshot knows."""
        return int(self._open_table.version())

    @property
    def id(self) -> str:
        """The table's identity; another one after it was deleted and made again."""
        return str(self._open_table.metadata().id)

    def open(self, contract: Contract) -> None:
        """Load the newest snapshot; makes the table when it is not there and adds columns the contract has gained."""
        try:
            self._table = DeltaTable(self.url, storage_options=self._options)
        except TableNotFoundError:
            self._table = DeltaTable.create(
                self.url,
                schema=contract.table_schema(),
                mode="ignore",
                configuration=_CONFIGURATION,
                storage_options=self._options,
            )
            self._table = DeltaTable(self.url, storage_options=self._options)
        self._connect()
        self.evolve(contract)

    def _connect(self) -> None:
        self._files = pa_fs.PyFileSystem(DeltaStorageHandler.from_table(self._open_table._table))  # noqa: SLF001

    def look(self) -> None:
        """Load the newest snapshot of a table that is there, for reading only."""
        if self._table is None:
            self._table = DeltaTable(self.url, storage_options=self._options)
            self._connect()
        else:
            self._table.update_incremental()

    def evolve(self, contract: Contract) -> None:
        """Add columns that the contract has and the table lacks."""
        present = {field.name for field in self._open_table.schema().fields}
        added = [
            Field(field.name, _delta_type(field.type), nullable=True)
            for field in contract.arrow_schema()
            if field.name not in present
        ]
        if added:
            self._open_table.alter.add_columns(added)

    def fence(self) -> None:
        """Make every commit fail that another process prepared before now."""
        table = self._open_table
        table.create_write_transaction([], "append", table.schema(), commit_properties=self._commit_properties("", {}))
        table.update_incremental()

    def append(self, rows: pa.Table, group_id: str, offsets: Mapping[str, int]) -> int:
        """Commit `rows` (any subset of the table's columns) as one version, from the snapshot at hand.

        Args:
            rows: records with their bookkeeping columns.
            group_id: found again by `find`.
            offsets: each source's last offset among the rows.

        Returns:
            The version that holds the rows.

        Raises:
            UnavailableError: another process has written; open again and plan anew.
        """
        table = self._open_table
        schema = pa.schema(table.schema().to_arrow())
        try:
            write_deltalake(
                table,
                # One chunk: delta-rs writes the chunks of a table in any order.
                aligned(rows, schema).combine_chunks(),
                mode="append",
                writer_properties=self._properties,
                commit_properties=self._commit_properties(group_id, offsets),
            )
        except CommitFailedError as error:
            raise UnavailableError("WRITER_FENCED", f"another process wrote the table first: {error}") from error
        return self.version

    def _commit_properties(self, group_id: str, offsets: Mapping[str, int]) -> CommitProperties:
        sequence = (self._open_table.transaction_version(WRITER) or 0) + 1
        transactions = [Transaction(WRITER, sequence)]
        transactions += [Transaction(_SOURCE_PREFIX + source, offset) for source, offset in offsets.items()]
        return CommitProperties(custom_metadata={GROUP_KEY: group_id}, app_transactions=transactions)

    def landed_offset(self, source: str) -> int:
        """Last offset of `source` that a commit carries; 0 for none."""
        return int(self._open_table.transaction_version(_SOURCE_PREFIX + source) or 0)

    def find(self, group_id: str, after: int) -> Commit | None:
        """The commit of a group among the versions after `after`."""
        return next((commit for commit in self.commits(after) if commit.group_id == group_id), None)

    def commits(self, after: int) -> Iterator[Commit]:
        """The log's entries after version `after`, up to the snapshot at hand, oldest first."""
        assert self._files is not None
        for version in range(after + 1, self.version + 1):
            with self._files.open_input_stream(f"_delta_log/{version:020d}.json") as stream:
                yield _commit(version, stream.read())

    def files(self) -> list[str]:
        """Every file of the snapshot."""
        return [str(path) for path in self._open_table.get_add_actions(flatten=True)["path"].to_pylist()]

    def sized_files(self, version: int) -> list[tuple[str, int]]:
        """Every file of a version with its number of rows, by path."""
        assert self._files is not None
        paths = sorted(str(path) for path in self._at(version).get_add_actions(flatten=True)["path"].to_pylist())
        found: list[tuple[str, int]] = []
        for path in paths:
            with self._files.open_input_file(unquote(path)) as source, pq.ParquetFile(source) as file:
                found.append((path, file.metadata.num_rows))
        return found

    def dataset(self, version: int) -> pa_dataset.Dataset:
        """A version's rows, for scans that skip files by their statistics."""
        return self._at(version).to_pyarrow_dataset()

    def _at(self, version: int) -> DeltaTable:
        if version == self.version:
            return self._open_table
        return DeltaTable(self.url, version=version, storage_options=self._options)

    def read(self, files: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
        """Rows of data files, a row group at a time, in the order they were written."""
        assert self._files is not None
        for path in files:
            with self._files.open_input_file(unquote(path)) as source, pq.ParquetFile(source) as file:
                present = [name for name in columns if name in file.schema_arrow.names]
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns=present)

    def rows_of(self, source: str, offset: int) -> pa.Table:
        """The rows of one batch, found by the bookkeeping columns; reads the table, for repairs only."""
        wanted = (pc.field(SOURCE_COLUMN) == source) & (pc.field(OFFSET_COLUMN) == offset)
        return self._open_table.to_pyarrow_dataset().to_table(filter=wanted)

    def rows(self) -> int:
        """Rows of the snapshot, from the log's statistics."""
        return int(self._open_table.count())

    def maintain(self) -> None:
        """Merge small files and load the snapshot anew: both keep the cost of a commit from growing with the table."""
        self._open_table.optimize.compact(target_size=self._compact_target_bytes)
        self.reload()

    def reload(self) -> None:
        """Load the newest snapshot."""
        self._table = DeltaTable(self.url, storage_options=self._options)

    def z_order(self, columns: Sequence[str]) -> None:
        """Rewrite every file, with records near each other whose values in `columns` are; readers that filter by them skip files."""
        self._open_table.optimize.z_order(columns, target_size=self._compact_target_bytes)
        self.reload()

    def vacuum(self, retention_h: int, keep: Sequence[int]) -> int:
        """Delete files that no version of the last `retention_h` hours has, nor one of `keep`; returns how many."""
        self._set({"delta.deletedFileRetentionDuration": f"interval {retention_h} hours"})
        versions = list(keep) or None
        # delta-rs names files that are gone already as long as the log tells of their removal.
        named = self._open_table.vacuum(
            retention_h, dry_run=True, enforce_retention_duration=False, keep_versions=versions
        )
        there = self._present(named)
        if there:
            self._open_table.vacuum(
                retention_h, dry_run=False, enforce_retention_duration=False, keep_versions=versions
            )
            self.reload()
        return there

    def clean_log(self, retention_h: int) -> None:
        """Write a checkpoint and delete log entries before it that are older than `retention_h` hours; their versions cannot be read again."""
        self._set({"delta.logRetentionDuration": f"interval {retention_h} hours"})
        self._open_table.create_checkpoint()
        self._open_table.cleanup_metadata()

    def _set(self, properties: dict[str, str]) -> None:
        present = self._open_table.metadata().configuration
        if any(present.get(name) != value for name, value in properties.items()):
            self._open_table.alter.set_table_properties(properties)
            self.reload()

    def at(self, *, version: int | None = None, instant: datetime | None = None) -> "Snapshot":
        """The table as it was at a version, or at an instant; without either as it is.

        Raises:
            NotFoundError: no such version, or it cannot be read any more.
        """
        name = self.url.rsplit("/", 1)[-1]
        wanted = f"{name}@{instant.isoformat() if instant else version}"
        # delta-rs looks for every version up to the one it is asked for, however far that is.
        if version is not None and version > self.version:
            raise NotFoundError("table version", wanted)
        try:
            if instant is not None:
                table = DeltaTable(self.url, storage_options=self._options)
                table.load_as_version(instant)
            else:
                table = DeltaTable(self.url, version=version, storage_options=self._options)
        except (DeltaError, TableNotFoundError):
            raise NotFoundError("table version", wanted) from None
        found = Snapshot(int(table.version()), int(table.count()), self._lost(table))
        # Delta answers with its first version for an instant before it.
        if instant is not None and found.version == 0 and (entry := self.entry(0)) is not None and entry.at > instant:
            raise NotFoundError("table version", wanted)
        return found

    def _present(self, paths: Sequence[str]) -> int:
        """How many of these files are there."""
        assert self._files is not None
        infos = self._files.get_file_info([unquote(path) for path in paths]) if paths else []
        return sum(info.type != pa_fs.FileType.NotFound for info in infos)

    def _lost(self, table: DeltaTable) -> bool:
        """Whether a file of an older snapshot is gone; those that the present one has are there."""
        present = set(self.files())
        older = [str(path) for path in table.get_add_actions(flatten=True)["path"].to_pylist()]
        removed = [path for path in older if path not in present]
        return self._present(removed) < len(removed)

    def entry(self, version: int) -> "LogEntry | None":
        """What the log says of one version; None when it does not reach so far (any more)."""
        assert self._files is not None
        try:
            with self._files.open_input_stream(f"_delta_log/{version:020d}.json") as stream:
                return _entry(version, stream.read())
        except FileNotFoundError:
            return None


def aligned(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """`rows` with exactly the columns of `schema`; absent ones are null."""
    columns = [
        rows.column(field.name) if field.name in rows.column_names else pa.nulls(rows.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _entry(version: int, content: bytes) -> LogEntry:
    at, operation, rows = datetime.fromtimestamp(0, UTC), "", 0
    for line in content.splitlines():
        action = json.loads(line)
        if "commitInfo" in action:
            at = datetime.fromtimestamp(int(action["commitInfo"].get("timestamp", 0)) / 1000, UTC)
            operation = str(action["commitInfo"].get("operation", ""))
        elif "add" in action and action["add"]["dataChange"]:
            rows += int(json.loads(action["add"].get("stats") or "{}").get("numRecords", 0))
    return LogEntry(version, at, operation, rows)


def _commit(version: int, content: bytes) -> Commit:
    group_id, files, rows, at_s = "", [], 0, 0.0
    for line in content.splitlines():
        action = json.loads(line)
        if "commitInfo" in action:
            group_id = str(action["commitInfo"].get(GROUP_KEY, ""))
            at_s = int(action["commitInfo"].get("timestamp", 0)) / 1000
        elif "add" in action and action["add"]["dataChange"]:
            files.append(str(action["add"]["path"]))
            rows += int(json.loads(action["add"].get("stats") or "{}").get("numRecords", 0))
    return Commit(version, group_id, tuple(files), rows, at_s)
