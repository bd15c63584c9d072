"""The records of a join: which columns they have, whether a contract fits them, and how they are made of left and right rows."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError

from millrace_ingestion.checks import MAX_EVENT_ID_BYTES
from millrace_ingestion.contracts import Column, ColumnType, Contract
from millrace_ingestion.joins.matching import I64, Pairs
from millrace_ingestion.joins.specs import JoinKind, JoinSpec
from millrace_ingestion.validation import validate

ID, TIME, MATCHED = "join_id", "joined_at", "matched"
_OWN = (ID, TIME, MATCHED)
_KEY_TYPES = frozenset({ColumnType.STRING, ColumnType.INT64, ColumnType.BOOL, ColumnType.TIMESTAMP})


class Side(Enum):
    """Where a column's values come from."""

    LEFT = "left"
    RIGHT = "right"
    JOIN = "join"


@dataclass(frozen=True)
class Origin:
    """One column of a join's records."""

    side: Side
    source: str
    """The input's column, or one of the join's own."""
    type: ColumnType
    nullable: bool = False


@dataclass(frozen=True)
class Layout:
    """How records of one contract version are made, and what is read of the inputs for them."""

    spec: JoinSpec
    contract: Contract
    origins: Mapping[str, Origin]
    left: "Read"
    right: "Read"


@dataclass(frozen=True)
class Read:
    """What is read of an input."""

    id: str
    time: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    """All of them, with these three."""

    @classmethod
    def of(cls, contract: Contract, keys: Sequence[str], more: Sequence[str]) -> "Read":
        """What a join needs of the records of `contract`."""
        names = (contract.event_id_column, contract.event_time_column, *keys, *more)
        return cls(contract.event_id_column, contract.event_time_column, tuple(keys), tuple(dict.fromkeys(names)))


def check_keys(spec: JoinSpec, left: Contract, right: Contract) -> None:
    """Whether both contracts have the keys, with equal types.

    Raises:
        FailedPreconditionError: naming the column.
    """
    lefts = {column.name: column for column in left.columns}
    rights = {column.name: column for column in right.columns}
    for key in spec.keys:
        for name, columns, contract in ((key.left, lefts, left), (key.right, rights, right)):
            if name not in columns:
                raise _mismatch(contract.name, name, "is no column of the contract, and the join's key needs it")
        kinds = lefts[key.left].type, rights[key.right].type
        if kinds[0] is not kinds[1]:
            told = f"is {kinds[0].value} and {right.name}.{key.right} is {kinds[1].value}: keys need equal types"
            raise _mismatch(left.name, key.left, told)
        if kinds[0] not in _KEY_TYPES:
            raise _mismatch(
                left.name, key.left, f"is {kinds[0].value}, whose values are equal by chance: it can be no key"
            )


def columns_of(spec: JoinSpec, left: Contract, right: Contract) -> dict[str, Origin]:
    """Every column that the records of a join can have: its own, the left ones, the right ones without the keys."""
    found = {ID: Origin(Side.JOIN, ID, ColumnType.STRING), TIME: Origin(Side.JOIN, TIME, ColumnType.TIMESTAMP)}
    if spec.kind is not JoinKind.INNER:
        found[MATCHED] = Origin(Side.JOIN, MATCHED, ColumnType.INT64)
    for column in left.columns:
        name = f"{left.name}_{column.name}" if column.name.lower() in _OWN else column.name
        found[name] = Origin(Side.LEFT, column.name, column.type, column.nullable)
    taken = {name.lower() for name in found} | set(_OWN)
    keys = {key.right for key in spec.keys}
    prefix = spec.right_prefix or f"{right.name}_"
    for column in right.columns:
        if column.name in keys:
            continue
        name = prefix + column.name if column.name.lower() in taken else column.name
        taken.add(name.lower())
        found[name] = Origin(Side.RIGHT, column.name, column.type, column.nullable or spec.kind is not JoinKind.INNER)
    return found


def generated(name: str, spec: JoinSpec, left: Contract, right: Contract) -> Contract:
    """The contract of a join's records with every column. The inputs' checks are not repeated: their records have passed them.

    Raises:
        FailedPreconditionError: the inputs cannot be joined so; names the column.
    """
    check_keys(spec, left, right)
    origins = columns_of(spec, left, right)
    by_left = {origin.source: out for out, origin in origins.items() if origin.side is Side.LEFT}
    keys = left.key_columns or tuple(key.left for key in spec.keys)
    contract = Contract(
        name,
        0,
        tuple(Column(out, origin.type, origin.nullable) for out, origin in origins.items()),
        ID,
        TIME,
        tuple(by_left[key] for key in keys),
    )
    try:
        return validate(contract, f"the contract of join {name!r}")
    except InvalidArgumentError as error:
        raise FailedPreconditionError(
            "JOIN_COLUMNS", f"{error.message}; choose a right_prefix, or register contract {name!r} with fewer columns"
        ) from None


def layout(spec: JoinSpec, left: Contract, right: Contract, contract: Contract) -> Layout:
    """How records of `contract` are made: its event id and event time are the join's, every other column is one of the inputs'.

    Raises:
        FailedPreconditionError: it has a column that the join cannot fill; names it.
    """
    check_keys(spec, left, right)
    known = columns_of(spec, left, right)
    roles = {contract.event_id_column: known[ID], contract.event_time_column: known[TIME]}
    origins: dict[str, Origin] = {}
    for column in contract.columns:
        origin = roles.get(column.name) or known.get(column.name)
        if origin is None:
            raise _mismatch(contract.name, column.name, f"is no column of {left.name!r} or {right.name!r}")
        if origin.type is not column.type:
            raise _mismatch(contract.name, column.name, f"must be {origin.type.value}, as in the input")
        if origin.nullable and not column.nullable:
            raise _mismatch(contract.name, column.name, "must be nullable, because the join may have no value for it")
        origins[column.name] = origin
    used = {side: [one.source for one in origins.values() if one.side is side] for side in Side}
    return Layout(
        spec,
        contract,
        origins,
        Read.of(left, [key.left for key in spec.keys], used[Side.LEFT]),
        Read.of(right, [key.right for key in spec.keys], used[Side.RIGHT]),
    )


def _mismatch(contract: str, column: str, text: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        "JOIN_CONTRACT", f"contract {contract!r}, column {column!r}: {text}", {"contract": contract, "column": column}
    )


class Maker:
    """Makes records.

    Args:
        how: the layout.
        limit: records of one table at most.
        max_bytes: size of one table at most, where it has more than one record.
    """

    def __init__(self, how: Layout, limit: int, max_bytes: int) -> None:
        self._how = how
        self._limit = limit
        self._max_bytes = max_bytes

    def pairs(self, left: pa.Table, right: pa.Table, pairs: Pairs) -> Iterator[pa.Table]:
        """Records of rows that belong together; their event time is the later of the two, of AS_OF the left one."""
        lefts, rights = left.take(pa.array(pairs.left)), right.take(pa.array(pairs.right))
        how = self._how
        if how.spec.kind is JoinKind.AS_OF:
            ids, times = lefts.column(how.left.id), lefts.column(how.left.time)
        else:
            ids = pair_ids(lefts.column(how.left.id), rights.column(how.right.id))
            left_times, right_times = lefts.column(how.left.time), rights.column(how.right.time)
            times = pc.if_else(pc.greater(left_times, right_times), left_times, right_times)
        yield from self._made(lefts, rights, ids, times, 1)

    def alone(self, left: pa.Table, mask: npt.NDArray[np.bool_]) -> Iterator[pa.Table]:
        """Records of left rows without a partner; their event time is the end of the time in which one could have been."""
        how = self._how
        lefts = left.filter(pa.array(mask))
        ids, times = lefts.column(how.left.id), lefts.column(how.left.time)
        if how.spec.kind is JoinKind.LEFT:
            ids = alone_ids(ids)
            moved = np.asarray(times.cast(pa.int64())) + how.spec.after_us
            times = pa.chunked_array([pa.array(moved).cast(times.type)])
        yield from self._made(lefts, None, ids, times, 0)

    def _made(
        self, left: pa.Table, right: pa.Table | None, ids: pa.ChunkedArray, times: pa.ChunkedArray, matched: int
    ) -> Iterator[pa.Table]:
        schema = self._how.contract.arrow_schema()
        own = {ID: ids, TIME: times, MATCHED: pa.repeat(pa.scalar(matched, pa.int64()), left.num_rows)}
        columns: list[pa.ChunkedArray | pa.Array] = []
        for name, origin in self._how.origins.items():
            if origin.side is Side.JOIN:
                columns.append(own[origin.source])
            elif origin.side is Side.LEFT:
                columns.append(left.column(origin.source))
            elif right is not None:
                columns.append(right.column(origin.source))
            else:
                columns.append(pa.nulls(left.num_rows, schema.field(name).type))
        yield from _bounded(pa.table(columns, schema=schema), self._limit, self._max_bytes)


def _bounded(table: pa.Table, limit: int, max_bytes: int) -> Iterator[pa.Table]:
    """Slices within the limits, in order."""
    if table.num_rows == 0:
        return
    if table.num_rows > limit or (table.nbytes > max_bytes and table.num_rows > 1):
        half = table.num_rows // 2
        yield from _bounded(table.slice(0, half), limit, max_bytes)
        yield from _bounded(table.slice(half), limit, max_bytes)
        return
    yield table


def pair_ids(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    """Event ids of pairs: `<length of the left id>:<left id>/<right id>`, which no other pair has, in any run of any join."""
    return _short(pc.binary_join_element_wise(_headed(left), right, "/"))


def alone_ids(left: pa.ChunkedArray) -> pa.ChunkedArray:
    """Event ids of left rows without a partner, which no pair has."""
    return _short(_headed(left))


def _headed(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(pc.binary_length(ids).cast(pa.string()), ids, ":")


def _short(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids that are too long as their SHA-256."""
    long = pc.greater(pc.binary_length(ids), MAX_EVENT_ID_BYTES)
    if not pc.any(long).as_py():
        return ids
    hashed = [
        hashlib.sha256(one.encode()).hexdigest() if len(one.encode()) > MAX_EVENT_ID_BYTES else one
        for one in ids.to_pylist()
    ]
    return pa.chunked_array([pa.array(hashed, pa.string())])


def times_of(table: pa.Table, name: str) -> I64:
    """An event time column in microseconds since the epoch."""
    return table.column(name).cast(pa.int64()).to_numpy()  # type: ignore[no-any-return]
