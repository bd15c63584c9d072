"""Lands groups of batches: the order of the durable steps, and what a restart makes of a half-done one.

1. plan: which batches are new, which of their records are duplicates (pure reading);
2. intent: one SQL transaction keeps the group, its batches' counts and its dead letters, not yet visible;
3. commit: one Delta commit, atomic, carries the records, the group's id and the sources' offsets. This decides;
4. index: the duplicate index follows the table;
5. publish (by the caller): one message a batch;
6. finish: one SQL transaction makes the group complete. Only then are the batches answered.

At opening, the table is fenced (no commit of an earlier process can succeed any more), the index catches up from the log, and each
intent is looked for in the log: found, it goes on with step 5 from the records in the lake; not found, it is discarded, and the client,
who was never answered, sends its batches again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pyarrow as pa
from millrace_kit.clock import uuid7
from millrace_kit.errors import FailedPreconditionError, MillraceError

from millrace_ingestion.checks import Failure
from millrace_ingestion.contracts import OFFSET_COLUMN, SOURCE_COLUMN, Contract
from millrace_ingestion.hashing import U64, hash_strings
from millrace_ingestion.id_index import IdIndex, Mask, first_copies
from millrace_ingestion.lake import Commit, LakeTable, aligned
from millrace_ingestion.models import Entry, Group, Landed, Outcome, Pending, Piece
from millrace_ingestion.quarantine import Held, Quarantine
from millrace_ingestion.store import Store

T = TypeVar("T")
CrashPoint = Callable[[str], None]
"""Called with the name of each step as it is done; tests end the process there."""

STEPS = ("planned", "intent", "committed", "indexed", "published", "finished")


def no_crash(_step: str) -> None:
    """Production's crash point."""


class Landing:
    """One contract's way into the lake. Blocking, and used from one thread at a time.

    Args:
        contract: the newest version; after a change, `open` brings the table to it.
        table: its Delta table.
        index: its event ids.
        store: batches, intents and dead letters.
        quarantine: the table for batches that a check holds.
        maintain_every: commits between two compactions.
        crash_point: see `CrashPoint`.
    """

    def __init__(
        self,
        contract: Contract,
        table: LakeTable,
        index: IdIndex,
        store: Store,
        quarantine: Quarantine,
        *,
        maintain_every: int,
        crash_point: CrashPoint = no_crash,
    ) -> None:
        self.contract = contract
        self.table = table
        self._index = index
        self._store = store
        self._quarantine = quarantine
        self._maintain_every = maintain_every
        self._since_maintenance = 0
        self._crash_point = crash_point

    def open(self) -> Sequence[Landed]:
        """Become the only writer; returns groups that are in the lake and may not be on the bus."""
        self.table.open(self.contract)
        self.table.fence()
        self._quarantine.close()
        self._catch_up()
        unpublished: list[Landed] = []
        for group in self._store.intents(self.contract.name):
            commit = self.table.find(group.id, group.base_version)
            if commit is None:
                self._store.discard(group.id)
            else:
                unpublished.append(self._from_lake(group, commit))
        return unpublished

    def land(self, batches: Sequence[Pending]) -> Landed:
        """Steps 1 to 4.

        Raises:
            UnavailableError: the lake or the database did not answer, or another process writes; open again before the next group.
        """
        results, fresh, again = self._sorted(batches)
        landing = [pending for _index, pending in fresh if pending.checked.held is None]
        masks, new_ids = self._without_duplicates(landing)
        planned = [_entry(pending, mask, self.contract) for pending, mask in zip(landing, masks, strict=True)]
        pieces = [piece for _entry, piece in planned if piece.rows]
        landed = iter([entry for entry, _piece in planned])
        entries = [next(landed) if p.checked.held is None else _held_entry(p, p.checked.held) for _index, p in fresh]
        held = [Held(p.source, p.offset, p.checked.table) for _index, p in fresh if p.checked.held is not None]
        group = Group(uuid7(), self.contract.name, self.contract.version, self.table.version, entries)
        self._crash_point("planned")
        version = self._commit(group, pieces, new_ids, held) if entries else self.table.version
        for (index, _pending), entry in zip(fresh, entries, strict=True):
            results[index] = _outcome(self.contract.name, entry, version)
        settled = [_settled(results, result) for result in results]
        return Landed(group.id, group.contract, group.contract_version, version, [*again, *pieces], settled, entries)

    def finish(self, landed: Landed) -> None:
        """Step 6, and now and then the table's maintenance."""
        self._crash_point("published")
        if landed.pieces:  # a group that brought no rows was complete when it was recorded
            self._store.finish(landed.group_id, landed.table_version)
        self._crash_point("finished")

    def maintain(self) -> None:
        """Compact the table when it is time."""
        if self._since_maintenance < self._maintain_every:
            return
        self.keep_up(lambda table: table.maintain())

    def keep_up(self, work: Callable[[LakeTable], T]) -> T:
        """Do maintenance that commits nothing but itself, and follow it."""
        self._since_maintenance = 0
        done = work(self.table)
        self._catch_up()
        return done

    def last_offset(self, source: str) -> int:
        """Offset of the source's last batch that landed; 0 for none."""
        return max(self._store.last_offset(self.contract.name, source), self.table.landed_offset(source))

    def _sorted(
        self, batches: Sequence[Pending]
    ) -> tuple[list[Outcome | MillraceError | int], list[tuple[int, Pending]], list[Piece]]:
        """Batches that are new, with their place; results of the others (a number repeats the result of that place)."""
        last: dict[str, int] = {}
        places: dict[tuple[str, int], int] = {}
        results: list[Outcome | MillraceError | int] = []
        fresh: list[tuple[int, Pending]] = []
        again: list[Piece] = []
        for index, given in enumerate(batches):
            pending = given
            if pending.source not in last:
                last[pending.source] = self.last_offset(pending.source)
            if pending.offset == 0:
                pending = replace(pending, offset=last[pending.source] + 1)
            key = (pending.source, pending.offset)
            if key in places:
                results.append(places[key])
                continue
            places[key] = index
            if pending.offset > last[pending.source]:
                if pending.after not in {None, last[pending.source]}:
                    results.append(_source_moved(self.contract.name, pending, last[pending.source]))
                    continue
                last[pending.source] = pending.offset
                fresh.append((index, pending))
                results.append(index)
                continue
            result, piece = self._landed_before(pending, last[pending.source])
            results.append(result)
            if piece is not None:
                again.append(piece)
        return results, fresh, again

    def _landed_before(self, pending: Pending, last: int) -> tuple[Outcome | MillraceError, Piece | None]:
        known = self._store.outcome(self.contract.name, pending.source, pending.offset)
        if known is not None:
            return known, None
        # The lake is ahead of the database (one was restored from a backup): what it holds of the batch counts.
        rows = self.table.rows_of(pending.source, pending.offset)
        if rows.num_rows:
            piece = Piece(pending.source, pending.offset, rows.num_rows, self._records(rows))
            return _outcome(self.contract.name, _known_entry(piece), self.table.version, replayed=True), piece
        return _out_of_order(self.contract.name, pending, last), None

    def _without_duplicates(self, fresh: Sequence[Pending]) -> tuple[list[Mask], tuple[U64, U64]]:
        """For each batch which of its records are new, and the new ids' hashes."""
        if not fresh:
            return [], (np.empty(0, np.uint64), np.empty(0, np.uint64))
        high = np.concatenate([pending.checked.high for pending in fresh])
        low = np.concatenate([pending.checked.low for pending in fresh])
        new = first_copies(high, low) & ~self._index.contains(high, low)
        ends = np.cumsum([len(pending.checked.high) for pending in fresh])
        return np.split(new, ends[:-1]), (high, low) if new.all() else (high[new], low[new])

    def held_records(self, source: str, offset: int) -> pa.Table:
        """Records of a quarantined batch, with the columns of the newest contract."""
        return self._quarantine.records(self.contract, source, offset)

    def _commit(self, group: Group, pieces: Sequence[Piece], new_ids: tuple[U64, U64], held: Sequence[Held]) -> int:
        if not pieces:
            self._quarantine.put(self.contract, held, group.id)
            self._store.record(group, self.table.version)
            return self.table.version
        self._store.record(group, None)
        self._crash_point("intent")
        self._quarantine.put(self.contract, held, group.id)
        rows = pa.concat_tables([_with_bookkeeping(piece) for piece in pieces])
        offsets = {entry.source: entry.offset for entry in group.entries}
        version = self.table.append(rows, group.id, offsets)
        self._crash_point("committed")
        if version == self._index.version + 1:
            self._index.add(*new_ids, version)
        else:
            self._catch_up()
        self._since_maintenance += 1
        self._crash_point("indexed")
        return version

    def _catch_up(self) -> None:
        """Bring the index to the table's newest version."""
        column = self.contract.event_id_column
        try:
            known = self._index.table_id == self.table.id and self._index.version <= self.table.version
            for commit in self.table.commits(self._index.version) if known else ():
                self._add_ids(commit.files, column, commit.version)
        except FileNotFoundError:
            known = False
        if not known:
            # New, of another table, or older than the log reaches: every id is in the table itself.
            self._index.clear(self.table.id)
            self._add_ids(self.table.files(), column, self.table.version)
            self._index.flush()

    def _add_ids(self, files: Sequence[str], column: str, version: int) -> None:
        highs, lows = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for rows in self.table.read(files, [column]):
            for chunk in rows.column(column).drop_null().chunks:
                high, low = hash_strings(chunk)
                highs.append(high)
                lows.append(low)
        self._index.add(np.concatenate(highs), np.concatenate(lows), version)

    def _from_lake(self, group: Group, commit: Commit) -> Landed:
        pieces: list[Piece] = []
        names = [*self.contract.arrow_schema().names, SOURCE_COLUMN, OFFSET_COLUMN]
        rows = pa.concat_tables(list(self.table.read(commit.files, names)))
        for part in _by_batch(rows):
            source, offset = part.column(SOURCE_COLUMN)[0].as_py(), part.column(OFFSET_COLUMN)[0].as_py()
            pieces.append(Piece(source, offset, part.num_rows, self._records(part)))
        return Landed(group.id, group.contract, group.contract_version, commit.version, pieces)

    def _records(self, rows: pa.Table) -> pa.Table:
        return aligned(rows, self.contract.arrow_schema())


def _entry(pending: Pending, new: Mask, contract: Contract) -> tuple[Entry, Piece]:
    """What is stored and what lands of a batch; `contract` is the newest version, the batch may follow an older one."""
    checked = pending.checked
    accepted = int(new.sum())
    as_sent = accepted == len(new) and pending.contract.version == contract.version
    table = aligned(
        checked.table if accepted == len(new) else checked.table.filter(pa.array(new)), contract.arrow_schema()
    )
    replayed = pending.letter_ids is not None
    entry = Entry(
        pending.source,
        pending.offset,
        accepted,
        len(new) - accepted,
        len(checked.rejects),
        () if replayed else checked.rejects,
        # A letter whose event landed meanwhile by another way needs no replay either.
        pending.letter_ids[checked.rows].tolist() if pending.letter_ids is not None else (),
        released_ids=pending.released_ids,
    )
    return entry, Piece(pending.source, pending.offset, accepted, table, pending.arrow_ipc if as_sent else None)


def _held_entry(pending: Pending, held: Failure) -> Entry:
    """What is stored of a batch that goes to the quarantine: its dead letters are dead letters all the same."""
    checked = pending.checked
    rejects = checked.rejects
    return Entry(
        pending.source, pending.offset, 0, 0, len(rejects), rejects, held=held, quarantined=checked.table.num_rows
    )


def _settled(
    results: Sequence[Outcome | MillraceError | int], result: Outcome | MillraceError | int
) -> Outcome | MillraceError:
    if not isinstance(result, int):
        return result
    first = results[result]
    assert not isinstance(first, int)
    return replace(first, replayed=True) if isinstance(first, Outcome) else first


def _known_entry(piece: Piece) -> Entry:
    return Entry(piece.source, piece.offset, piece.rows, 0, 0)


def _outcome(contract: str, entry: Entry, version: int, *, replayed: bool = False) -> Outcome:
    return Outcome(
        contract,
        entry.source,
        entry.offset,
        entry.accepted,
        entry.duplicates,
        entry.rejected,
        version,
        replayed=replayed,
        quarantined=entry.quarantined,
    )


def _source_moved(contract: str, pending: Pending, last: int) -> MillraceError:
    return FailedPreconditionError(
        "SOURCE_MOVED",
        f"source {pending.source!r} is at offset {last}, and the batch goes on after {pending.after}",
        {"contract": contract, "source": pending.source, "after": str(pending.after), "last_offset": str(last)},
    )


def _out_of_order(contract: str, pending: Pending, last: int) -> MillraceError:
    return FailedPreconditionError(
        "OFFSET_OUT_OF_ORDER",
        f"offset {pending.offset} of source {pending.source!r} never landed and {last} has: offsets must rise",
        {"contract": contract, "source": pending.source, "offset": str(pending.offset), "last_offset": str(last)},
    )


def _with_bookkeeping(piece: Piece) -> pa.Table:
    table = piece.table.append_column(SOURCE_COLUMN, pa.repeat(pa.scalar(piece.source, pa.string()), piece.rows))
    return table.append_column(OFFSET_COLUMN, pa.repeat(pa.scalar(piece.offset, pa.int64()), piece.rows))


def _by_batch(rows: pa.Table) -> Iterator[pa.Table]:
    """The rows of each batch; a source's batches by offset, rows in their order."""
    if rows.num_rows == 0:
        return
    rows = rows.combine_chunks()
    source = rows.column(SOURCE_COLUMN).chunk(0).dictionary_encode().indices.to_numpy(zero_copy_only=False)
    offset = rows.column(OFFSET_COLUMN).to_numpy()
    order = np.lexsort((offset, source))  # stable
    source, offset = source[order], offset[order]
    ordered = rows.take(pa.array(order))
    changes = np.flatnonzero((source[1:] != source[:-1]) | (offset[1:] != offset[:-1])) + 1
    for start, end in pairwise([0, *changes.tolist(), rows.num_rows]):
        yield ordered.slice(start, end - start)
