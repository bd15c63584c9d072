"""Records that come as JSON lines (RFC 8259 objects, one a line, UTF-8).

What is converted to what (anything else is WRONG_TYPE, there is no guessing from strings):
- STRING from strings;
- INT64 from numbers without fraction and exponent, where the value fits;
- DOUBLE from numbers, and from "NaN", "Infinity" and "-Infinity" (protobuf's JSON mapping);
- BOOL from true and false;
- TIMESTAMP from RFC 3339 strings (no offset means UTC) and from whole numbers as microseconds since the epoch;
- FLOAT_LIST from arrays of numbers.
An absent member of a nullable column is null. Members the contract does not have are left out. Empty lines are skipped.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
from millrace_kit.errors import ResourceExhaustedError

from millrace_ingestion.checks import (
    MALFORMED_JSON,
    MISSING_COLUMN,
    MISSING_EVENT_ID,
    NO_TIME,
    NULL_NOT_ALLOWED,
    WRONG_TYPE,
    Arrival,
    Checked,
    Failure,
    Finding,
    Reject,
    Verdict,
    check_values,
    settle,
)
from millrace_ingestion.contracts import ARROW_TYPES, Column, ColumnType, Contract
from millrace_ingestion.rules import Policy

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_NAMED_FLOATS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_TYPES: dict[ColumnType, Any] = {
    ColumnType.STRING: str,
    ColumnType.INT64: _Int64,
    ColumnType.DOUBLE: float,
    ColumnType.BOOL: bool,
    ColumnType.TIMESTAMP: datetime | _Int64,
    ColumnType.FLOAT_LIST: list[float],
}
_BROKEN = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - offsets are applied to whole microseconds, which cannot overflow
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class _Line:
    """A line and its place among the records of the batch."""

    row: int
    text: bytes


class JsonReader:
    """Parses and checks the JSON records of one contract."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        fields: list[tuple[str, Any, Any]] = []
        for index, column in enumerate(contract.columns):
            kind = _TYPES[column.type] | None if column.nullable else _TYPES[column.type]
            default = None if column.nullable else msgspec.NODEFAULT
            fields.append((f"c{index}", kind, msgspec.field(name=column.name, default=default)))
        record = msgspec.defstruct("Record", fields, kw_only=True, gc=False)
        self._decoder = msgspec.json.Decoder(record)
        self._values = {column.name: msgspec.json.Decoder(_TYPES[column.type]) for column in contract.columns}
        self._members = msgspec.json.Decoder(dict[str, msgspec.Raw])

    def check(self, payload: bytes, *, max_rows: int, arrival: Arrival = NO_TIME) -> Checked:
        """Parse and check every line of `payload`.

        Raises:
            ResourceExhaustedError: there are more than `max_rows` records.
        """
        if payload.count(b"\n") >= max_rows and len(_lines(payload)) > max_rows:
            raise ResourceExhaustedError("max_batch_rows", f"the batch has more than {max_rows} records")
        try:
            records = self._decoder.decode_lines(payload)
        except _BROKEN:
            return self._one_by_one(_lines(payload), arrival)
        # The decoder takes any white space between records for a line's end; here it is the line that makes a record.
        if records and len(records) != payload.rstrip().count(b"\n") + 1:
            return self._one_by_one(_lines(payload), arrival)
        return self._columns(records, lambda: _lines(payload), [], arrival)

    def _one_by_one(self, lines: Sequence[_Line], arrival: Arrival) -> Checked:
        records: list[Any] = []
        good: list[_Line] = []
        rejects: list[Reject] = []
        for line in lines:
            try:
                record = self._decoder.decode(line.text)
            except _BROKEN:
                record = self._diagnose(line)
            if isinstance(record, Reject):
                rejects.append(record)
            else:
                records.append(record)
                good.append(line)
        if arrival.now_us is not None and not isinstance(arrival.now_us, int):
            arrival = replace(arrival, now_us=arrival.now_us[[line.row for line in good]])
        return self._columns(records, lambda: good, rejects, arrival)

    def _diagnose(self, line: _Line) -> Any:
        """Why a line does not parse as a record, or the record when one of its values needed a conversion."""
        try:
            members = self._members.decode(line.text)
            msgspec.json.decode(line.text)  # members kept raw are not checked for their UTF-8
        except _BROKEN as error:
            return Reject(line.row, Failure(MALFORMED_JSON, "", str(error)[:200]), as_text(line.text))
        values: list[Any] = []
        for column in self._contract.columns:
            value = self._value(column, members.get(column.name))
            if isinstance(value, Failure):
                return Reject(line.row, value, as_text(line.text))
            values.append(value)
        return _Converted(values)

    def _value(self, column: Column, raw: msgspec.Raw | None) -> Any:
        absent = raw is None
        if raw is None or bytes(raw) == b"null":
            if column.nullable:
                return None
            if column.name == self._contract.event_id_column:
                return Failure(MISSING_EVENT_ID, column.name, "the event id is missing, null or empty")
            if absent:
                return Failure(MISSING_COLUMN, column.name, "the record has no such member")
            return Failure(NULL_NOT_ALLOWED, column.name, "is null and the column is not nullable")
        try:
            return self._values[column.name].decode(raw)
        except msgspec.DecodeError as error:
            if column.type is ColumnType.DOUBLE:
                named = _NAMED_FLOATS.get(bytes(raw).decode("utf-8", "replace").strip('"'))
                if named is not None:
                    return named
            return Failure(WRONG_TYPE, column.name, str(error)[:200])

    def _columns(
        self,
        records: Sequence[Any],
        lines: Callable[[], Sequence[_Line]],
        rejects: Sequence[Reject],
        arrival: Arrival,
    ) -> Checked:
        """Check parsed records; `lines` gives their lines, which are needed only when some record is refused."""
        contract = self._contract
        columns = {
            column.name: _array([getattr(record, f"c{index}") for record in records], column)
            for index, column in enumerate(contract.columns)
        }
        verdict = Verdict(len(records))
        check_values(contract, columns, verdict, {}, arrival)
        table, rows, high, low = settle(contract, columns, verdict)
        failed = verdict.failed()
        findings = [*_found(rejects), *verdict.findings]
        if not failed and not rejects:
            return Checked(table, rows, [], high, low, findings, verdict.held)
        sources = lines()
        places = np.asarray([line.row for line in sources], np.int64)
        refused = [Reject(sources[at].row, failure, as_text(sources[at].text)) for at, failure in failed]
        every = sorted((*rejects, *refused), key=lambda reject: reject.row)
        return Checked(table, places[rows] if len(rows) else rows, every, high, low, findings, verdict.held)


def _found(rejects: Sequence[Reject]) -> list[Finding]:
    """Findings of the records that are none."""
    counts = Counter((reject.failure.column, reject.failure.reason.lower()) for reject in rejects)
    return [Finding(column, reason, Policy.REJECT, count) for (column, reason), count in counts.items()]


class _Converted:
    """A record whose values were converted one by one; looks like the decoder's own."""

    def __init__(self, values: Sequence[Any]) -> None:
        for index, value in enumerate(values):
            setattr(self, f"c{index}", value)


def _array(values: list[Any], column: Column) -> pa.Array:
    target = ARROW_TYPES[column.type]
    if column.type is not ColumnType.TIMESTAMP:
        return pa.array(values, target)
    try:
        return pa.array(values, target)
    except (pa.ArrowException, OverflowError, TypeError):
        return pa.array([_microseconds(value) for value in values], pa.int64()).view(target)


def _microseconds(value: datetime | int | None) -> int | None:
    if value is None or isinstance(value, int):
        return value
    offset = value.utcoffset() or timedelta()
    return (value.replace(tzinfo=None) - _EPOCH) // _MICROSECOND - offset // _MICROSECOND


def _lines(payload: bytes) -> list[_Line]:
    texts = (text.strip(b" \t\r") for text in payload.split(b"\n"))
    return [_Line(row, text) for row, text in enumerate(text for text in texts if text)]


def as_text(line: bytes) -> str:
    """A line as text that every store can hold; bytes that are no UTF-8, and NUL, are written as escapes."""
    return line.decode("utf-8", "backslashreplace").replace("\x00", "\\x00")


@lru_cache(maxsize=256)
def reader_for(contract: Contract) -> JsonReader:
    """The reader of a contract version, made once."""
    return JsonReader(contract)
