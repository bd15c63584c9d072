"""One input of a join: what its table gained since a version, and the slice of it that lies in a range of event time.

Nothing is read whole: a gain is bounded by the step that asks for it, a slice comes in batches, and of both only the columns that are used.
Files outside the range are skipped by Delta's statistics, row groups by Parquet's.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pa_dataset
from deltalake.exceptions import DeltaError
from millrace_kit.errors import FailedPreconditionError

from millrace_ingestion.contracts import ARROW_TYPES, Contract
from millrace_ingestion.joins.outputs import Read
from millrace_ingestion.joins.position import Added
from millrace_ingestion.lake import LakeTable, aligned

MAX_GAINED = 1_000
"""Versions whose log entries are read by one look."""
_INSTANT = pa.timestamp("us", "UTC")


class JoinInput:
    """The table of one contract, for reading only. Blocking, and used from one thread at a time.

    Args:
        contract: the newest version.
        table: its table; only this reader uses it.
        batch_rows: records of a slice read at once.
    """

    def __init__(self, contract: Contract, table: LakeTable, *, batch_rows: int) -> None:
        self.name = contract.name
        self._types = {column.name: ARROW_TYPES[column.type] for column in contract.columns}
        self._table = table
        self._batch_rows = batch_rows
        self._log: dict[int, Added] = {}
        self._files: dict[int, list[tuple[str, int]]] = {}
        self._dataset: tuple[int, pa_dataset.Dataset] | None = None

    def newest(self) -> int:
        """The table's newest version, by a look at the lake."""
        self._table.look()
        return self._table.version

    def gained(self, after: int) -> list[Added]:
        """The versions after one, oldest first; not all of them where there are very many.

        Raises:
            FailedPreconditionError: the log does not reach back so far any more.
        """
        self._log = {version: one for version, one in self._log.items() if version > after}
        known = max(self._log, default=after)
        try:
            for one in islice(self._table.commits(known), MAX_GAINED):
                self._log[one.version] = Added(one.version, one.rows, one.at_s, one.files)
        except FileNotFoundError:
            raise _lost(self.name, f"the log after version {known}") from None
        return [self._log[version] for version in sorted(self._log)]

    def rows(self, commits: Sequence[Added], read: Read) -> pa.Table:
        """The records that these versions brought.

        Raises:
            FailedPreconditionError: a file of theirs is gone.
        """
        schema = self._schema(read)
        files = [path for commit in commits for path in commit.files]
        return pa.concat_tables([schema.empty_table(), *(aligned(part, schema) for part in self._read(files, read))])

    def base(self, version: int, read: Read, first: int, end: int | None) -> pa.Table:
        """Records of a whole version, by their place in its files in the order of their paths; up to the last one without `end`.

        Raises:
            FailedPreconditionError: a file of the version is gone.
        """
        schema = self._schema(read)
        parts: list[pa.Table] = [schema.empty_table()]
        place = 0
        for path, rows in self._base_files(version):
            begin, stop = place, place + rows
            place = stop
            if stop <= first or (end is not None and begin >= end):
                continue
            at = begin
            for part in self._read([path], read):
                low = max(0, first - at)
                high = part.num_rows if end is None else min(part.num_rows, end - at)
                at += part.num_rows
                if low < high:
                    parts.append(aligned(part.slice(low, high - low), schema))
        return pa.concat_tables(parts)

    def base_rows(self, version: int) -> int:
        """How many records a whole version has."""
        return sum(rows for _path, rows in self._base_files(version))

    def _base_files(self, version: int) -> list[tuple[str, int]]:
        if version not in self._files:
            try:
                self._files = {version: self._table.sized_files(version)}
            except (DeltaError, FileNotFoundError) as error:
                raise _lost(self.name, f"version {version} ({error})") from None
        return self._files[version]

    def _read(self, files: Sequence[str], read: Read) -> Iterator[pa.Table]:
        try:
            yield from self._table.read(files, read.columns)
        except FileNotFoundError as error:
            raise _lost(self.name, str(error)) from None

    def slice(
        self, version: int, read: Read, columns: Sequence[str], after_us: int | None, until_us: int
    ) -> Iterator[pa.Table]:
        """Records of a version with an event time in `(after_us, until_us]`, in batches; without `after_us` from the first.

        Raises:
            FailedPreconditionError: the version cannot be read any more.
        """
        time = pc.field(read.time)
        wanted = time <= _scalar(until_us)
        if after_us is not None:
            wanted &= time > _scalar(after_us)
        try:
            for batch in self._at(version).to_batches(
                columns=list(columns),
                filter=wanted,
                batch_size=self._batch_rows,
                batch_readahead=2,
                fragment_readahead=1,
            ):
                if batch.num_rows:
                    schema = pa.schema([(name, self._types[name]) for name in columns])
                    yield aligned(pa.Table.from_batches([batch]), schema)
        except (DeltaError, FileNotFoundError) as error:
            raise _lost(self.name, f"version {version} ({error})") from None

    def _at(self, version: int) -> pa_dataset.Dataset:
        if self._dataset is None or self._dataset[0] != version:
            self._dataset = (version, self._table.dataset(version))
        return self._dataset[1]

    def _schema(self, read: Read) -> pa.Schema:
        return pa.schema([(name, self._types[name]) for name in read.columns])


def _scalar(us: int) -> pa.Scalar:
    return pa.scalar(us, pa.int64()).cast(_INSTANT)


def _lost(contract: str, what: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        "JOIN_INPUT_LOST",
        f"table {contract!r} no longer has {what}, which a join has not read: a vacuum or a removal of log entries came first; "
        f"keep vacuum_retention_h and log_retention_h longer than a join may stand still",
        {"contract": contract},
    )
