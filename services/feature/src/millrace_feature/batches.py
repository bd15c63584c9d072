"""From bus messages to one change of the online store: pure, apart from asking which batches were seen."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from google.protobuf.message import DecodeError
from millrace_api.events.v1 import events_pb2
from millrace_kit.bus import Message, TopicPartition, records_topic

from millrace_feature.metrics import APPLIED_RECORDS, BAD_MESSAGES, BAD_VECTORS, LATE_RECORDS, REPEATED_BATCHES
from millrace_feature.plan import Definitions, LatestView, View, WindowView
from millrace_feature.rows import Row, pick_rows
from millrace_feature.store import Change, Followed, Mark
from millrace_feature.tile_fields import FieldChange, layout_of
from millrace_feature.tiles import MICROSECONDS, event_times, reduce_rows
from millrace_feature.vectors import packed_columns

log = logging.getLogger(__name__)

Seen = Callable[[Sequence[Mark]], Collection[Mark]]
"""Which of some batches were applied before."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The records of one message."""

    contract: str
    version: int
    table: pa.Table


@dataclass(slots=True)
class _Reading:
    batches: list[Batch] = field(default_factory=list)
    seen: list[Mark] = field(default_factory=list)
    positions: dict[TopicPartition, int] = field(default_factory=dict)


def read_messages(messages: Sequence[Message], seen: Seen) -> _Reading:
    """Decode `messages`; a batch seen before is left out, and so is a message that cannot be read (it never could be)."""
    reading = _Reading()
    found: list[tuple[Mark, Batch]] = []
    for message in messages:
        reading.positions[message.place] = message.offset + 1
        contract = message.topic.removeprefix(records_topic(""))
        try:
            record, table = decode_message(message, contract)
        except (DecodeError, ValueError, pa.ArrowException, OSError) as error:
            BAD_MESSAGES.labels(contract).inc()
            log.error("%s offset %d cannot be read and is passed over: %s", message.topic, message.offset, error)  # noqa: TRY400
            continue
        found.append(((contract, record.source, record.source_offset), Batch(contract, record.table_version, table)))
    before = set(seen([mark for mark, _batch in found if mark[1]]))
    for mark, batch in found:
        if mark[1]:
            if mark in before:
                REPEATED_BATCHES.labels(batch.contract).inc()
                continue
            before.add(mark)
            reading.seen.append(mark)
        reading.batches.append(batch)
    return reading


def decode_message(message: Message, contract: str) -> tuple[events_pb2.RecordsLanded, pa.Table]:
    """(what landed, the records).

    Raises:
        DecodeError, ValueError, pa.ArrowException, OSError: the message cannot be read.
    """
    record = events_pb2.RecordsLanded.FromString(message.value)
    if record.contract != contract:
        raise ValueError(f"it names contract {record.contract!r}")
    with pa.ipc.open_stream(record.arrow_ipc) as stream:
        return record, stream.read_all()


def plan_change(
    reading: _Reading,
    definitions: Definitions,
    *,
    cuts: Mapping[str, int],
    followed: Mapping[str, Followed],
    until_us: int,
) -> Change:
    """The effects of `reading`.

    Args:
        reading: decoded messages.
        definitions: what to compute.
        cuts: group -> Delta version it was filled from; a batch of that version or an older one is in it already.
        followed: progress before.
        until_us: event times after this instant do not move the watermark.
    """
    tiles: list[tuple[str, FieldChange]] = []
    rows: list[tuple[str, Sequence[Row]]] = []
    for group, view in {view.group: view for view in definitions.views}.items():
        table = _joined(view, [b for b in reading.batches if b.contract == view.contract and b.version > cuts[group]])
        if table is None:
            continue
        if isinstance(view, LatestView):
            rows.append((group, _pick(view, table)))
        else:
            counted, late = timely(view, table)
            LATE_RECORDS.labels(view.name).inc(late)
            reduced = reduce_rows(
                counted, keys=view.join_keys, event_time=view.event_time, schema=view.schema, unit_us=view.step_us
            )
            tiles.append((group, FieldChange(layout_of(view), [reduced])))
    moved = dict(_progress(reading.batches, definitions, followed, until_us))
    groups: dict[str, list[str]] = {batch.contract: [] for batch in reading.batches}
    for group, view in {view.group: view for view in definitions.views}.items():
        if view.contract in groups:
            groups[view.contract].append(group)
    versions = {c: max(b.version for b in reading.batches if b.contract == c) for c in groups}
    base = {contract: followed.get(contract, Followed()) for contract in moved}
    return Change(tiles, rows, reading.seen, reading.positions, {}, moved, base, groups, versions)


def _pick(view: LatestView, table: pa.Table) -> Sequence[Row]:
    table, bad = packed_columns(table, view.vectors)
    for feature, count in bad.items():
        BAD_VECTORS.labels(view.name, feature).inc(count)
    return pick_rows(table, keys=view.join_keys, event_time=view.event_time, columns=view.features)


def timely(view: WindowView, table: pa.Table) -> tuple[pa.Table, int]:
    """(rows that did not come in too late for the view, how many did). A row without event time or arrival is not late."""
    if not view.late_us or not table.num_rows:
        return table, 0
    times = [
        table.column(name).cast(MICROSECONDS, safe=False).cast(pa.int64())
        for name in (view.arrived_at, view.event_time)
    ]
    late = pc.fill_null(pc.greater(pc.subtract(*times), view.late_us), fill_value=False)
    count = int(pc.sum(late).as_py() or 0)
    return (table.filter(pc.invert(late)), count) if count else (table, 0)


def _joined(view: View, batches: Iterable[Batch]) -> pa.Table | None:
    """The view's columns of all batches; a column an older contract version lacks is null."""
    if isinstance(view, LatestView):
        names = list(dict.fromkeys([view.event_time, *view.join_keys, *view.features]))
    else:
        names = list(view.source_columns)
    tables = []
    for batch in batches:
        present = {name: batch.table.column(name) for name in names if name in batch.table.column_names}
        missing = {name: pa.nulls(batch.table.num_rows) for name in names if name not in present}
        tables.append(pa.table({**present, **missing}).select(names))
    return pa.concat_tables(tables, promote_options="permissive") if tables else None


def _progress(
    batches: Sequence[Batch], definitions: Definitions, followed: Mapping[str, Followed], until_us: int
) -> Iterable[tuple[str, Followed]]:
    for contract in {batch.contract for batch in batches}:
        before = followed.get(contract, Followed())
        fresh = [b for b in batches if b.contract == contract and b.version > before.version]
        column = next((v.event_time for v in definitions.views if v.contract == contract), None)
        newest = before.watermark_us
        for batch in fresh:
            if column is None or column not in batch.table.column_names:
                continue
            times = event_times(batch.table.filter(batch.table.column(column).is_valid()), column)
            times = times[times <= until_us]
            if len(times):
                newest = int(np.max(times)) if newest is None else max(newest, int(np.max(times)))
        count = sum(batch.table.num_rows for batch in fresh)
        APPLIED_RECORDS.labels(contract).inc(count)
        yield contract, Followed(before.records + count, newest, before.version)
