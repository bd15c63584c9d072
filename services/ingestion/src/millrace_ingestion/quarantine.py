"""The table beside a contract's table in which batches wait that a check holds.

It is written before the contract's own commit, and a batch that is there already is not written again, so that a group that failed half
way and is sent again leaves one copy. Which batches are held is for the database to say: rows of a batch that it does not know are left
from such a group and mean nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from millrace_ingestion.contracts import OFFSET_COLUMN, SOURCE_COLUMN, Contract
from millrace_ingestion.lake import LakeTable, aligned


@dataclass(frozen=True)
class Held:
    """The records of a batch on their way into the quarantine."""

    source: str
    offset: int
    records: pa.Table


class Quarantine:
    """The quarantine table of one contract; it is made when the first batch needs it. Blocking, used from one thread at a time.

    Args:
        table: the Delta table.
    """

    def __init__(self, table: LakeTable) -> None:
        self.table = table
        self._open = False

    def close(self) -> None:
        """Open the table anew before it is used next: something failed, or the contract changed."""
        self._open = False

    def put(self, contract: Contract, batches: Sequence[Held], group_id: str) -> None:
        """Commit `batches`.

        Raises:
            UnavailableError: another process has written; close and plan anew.
        """
        if not batches:
            return
        self._ensure_open(contract)
        fresh = [batch for batch in batches if not self._has(batch)]
        if not fresh:
            return
        offsets: dict[str, int] = {}
        for batch in fresh:
            offsets[batch.source] = max(batch.offset, offsets.get(batch.source, 0))
        self.table.append(pa.concat_tables([_with_place(contract, batch) for batch in fresh]), group_id, offsets)

    def records(self, contract: Contract, source: str, offset: int) -> pa.Table:
        """The records of one batch, with the columns of `contract`."""
        self._ensure_open(contract)
        return aligned(self.table.rows_of(source, offset), contract.arrow_schema())

    def _ensure_open(self, contract: Contract) -> None:
        if not self._open:
            self.table.open(contract)
            self.table.fence()
            self._open = True

    def _has(self, batch: Held) -> bool:
        below = self.table.landed_offset(batch.source) >= batch.offset
        return below and bool(self.table.rows_of(batch.source, batch.offset).num_rows)


def _with_place(contract: Contract, batch: Held) -> pa.Table:
    rows = aligned(batch.records, contract.arrow_schema())
    rows = rows.append_column(SOURCE_COLUMN, pa.repeat(pa.scalar(batch.source, pa.string()), rows.num_rows))
    return rows.append_column(OFFSET_COLUMN, pa.repeat(pa.scalar(batch.offset, pa.int64()), rows.num_rows))
