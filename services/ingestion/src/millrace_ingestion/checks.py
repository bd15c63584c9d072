"""The checks of a contract, on whole columns.

A record that fails becomes one dead letter with the first failure in the contract's column order: WRONG_TYPE and MISSING_COLUMN come from
the conversion, then NULL_NOT_ALLOWED, OUT_OF_RANGE, NOT_ALLOWED_VALUE and PATTERN_MISMATCH here. A null in a nullable column passes
every check. NaN and infinities pass unless the column has a bound, which they fail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace_ingestion.contracts import ARROW_TYPES, Column, ColumnType, Contract, full_pattern
from millrace_ingestion.hashing import U64, hash_strings
from millrace_ingestion.origins import TASK_PUT, Origin

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

MALFORMED_JSON = "MALFORMED_JSON"
MISSING_COLUMN = "MISSING_COLUMN"
WRONG_TYPE = "WRONG_TYPE"
NULL_NOT_ALLOWED = "NULL_NOT_ALLOWED"
OUT_OF_RANGE = "OUT_OF_RANGE"
NOT_ALLOWED_VALUE = "NOT_ALLOWED_VALUE"
PATTERN_MISMATCH = "PATTERN_MISMATCH"
MISSING_EVENT_ID = "MISSING_EVENT_ID"
UNDECODABLE = "UNDECODABLE"
"""A message whose bytes are no record at all; a source refuses it before there is anything to check."""
REASONS = (
    MALFORMED_JSON, MISSING_COLUMN, WRONG_TYPE, NULL_NOT_ALLOWED, OUT_OF_RANGE, NOT_ALLOWED_VALUE, PATTERN_MISMATCH,
    MISSING_EVENT_ID, UNDECODABLE,
)  # fmt: skip

# Longer ids are refused, so that hashing a batch takes a bounded number of steps.
MAX_EVENT_ID_BYTES = 512
# Years 1 to 9999, what the readers' date types can hold; microseconds since the epoch.
MIN_TIMESTAMP_US = -62_135_596_800_000_000
MAX_TIMESTAMP_US = 253_402_300_799_999_999
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Failure:
    """Why a record was refused."""

    reason: str
    column: str
    detail: str


@dataclass(frozen=True)
class Reject:
    """A refused record: its place in the batch, why, and the record itself as JSON."""

    row: int
    failure: Failure
    record_json: str
    """Empty when there is no JSON of it; then the origin has its bytes."""
    origin: Origin | None = None
    stage: str = TASK_PUT
    exception: str = ""
    """Name of the error's class, where an exception refused the record."""

    @property
    def size(self) -> int:
        """Bytes this record occupies, about."""
        if self.origin is None:
            return len(self.record_json)
        headers = sum(len(name) + len(value or b"") for name, value in self.origin.headers)
        return len(self.record_json) + len(self.origin.value or b"") + len(self.origin.key or b"") + headers


@dataclass(frozen=True)
class Checked:
    """A batch after its checks."""

    table: pa.Table
    """Good records with the contract's columns and types."""
    rows: Rows
    """Place of each good record in the batch as it was sent."""
    rejects: Sequence[Reject]
    high: U64
    """First halves of the good records' event id hashes."""
    low: U64
    """Second halves."""

    @property
    def size(self) -> int:
        """Bytes this batch occupies in memory."""
        return int(self.table.nbytes) + sum(reject.size for reject in self.rejects)


@dataclass
class Verdict:
    """Which rows of a batch failed, and why; the first failure of a row stays."""

    rows: int
    failures: list[Failure] = field(default_factory=list)
    _marks: npt.NDArray[np.int32] | None = None

    def mark(self, rows: Mask, failure: Failure) -> None:
        """Note `failure` for rows that have none yet."""
        if not rows.any():
            return
        if self._marks is None:
            self._marks = np.full(self.rows, -1, np.int32)
        self._marks[rows & (self._marks < 0)] = len(self.failures)
        self.failures.append(failure)

    def good(self) -> Mask | None:
        """Rows without a failure; None when that is all of them."""
        return None if self._marks is None else self._marks < 0

    def failed(self) -> list[tuple[int, Failure]]:
        """Each failed row with its failure."""
        if self._marks is None:
            return []
        return [(int(row), self.failures[self._marks[row]]) for row in np.flatnonzero(self._marks >= 0)]


def check_values(
    contract: Contract, columns: Mapping[str, pa.Array], verdict: Verdict, failed: Mapping[str, Mask]
) -> None:
    """Check converted columns.

    Args:
        contract: the checks.
        columns: each column of the contract in its Arrow type; a value that could not be converted is null.
        verdict: takes the failures.
        failed: rows whose failure in a column is already known; they are not checked for null again.
    """
    for column in contract.columns:
        values = columns[column.name]
        if column.name == contract.event_id_column:
            _check_event_id(column, values, verdict, failed.get(column.name))
        elif not column.nullable and values.null_count:
            missing = _mask(pc.is_null(values))
            if column.name in failed:
                missing &= ~failed[column.name]
            verdict.mark(missing, Failure(NULL_NOT_ALLOWED, column.name, "is null and the column is not nullable"))
        for passes, failure in _value_checks(column, values):
            if not pc.all(passes, min_count=0).as_py():  # nulls are skipped
                verdict.mark(~_mask(pc.fill_null(passes, True)), failure)


def _check_event_id(column: Column, values: pa.Array, verdict: Verdict, failed: Mask | None) -> None:
    length = pc.fill_null(pc.binary_length(values), 0)
    empty = _mask(pc.equal(length, 0))
    if failed is not None:
        empty &= ~failed
    verdict.mark(empty, Failure(MISSING_EVENT_ID, column.name, "the event id is missing, null or empty"))
    detail = f"the event id is longer than {MAX_EVENT_ID_BYTES} bytes"
    verdict.mark(_mask(pc.greater(length, MAX_EVENT_ID_BYTES)), Failure(OUT_OF_RANGE, column.name, detail))


def _value_checks(column: Column, values: pa.Array) -> list[tuple[pa.Array, Failure]]:
    """Pairs of "which values pass" (null where the value is) and what a failure means."""
    checks: list[tuple[pa.Array, Failure]] = []

    def add(passes: pa.Array, reason: str, detail: str) -> None:
        checks.append((passes, Failure(reason, column.name, detail)))

    if column.type is ColumnType.TIMESTAMP:
        instants = values.view(pa.int64())
        passes = pc.and_(pc.greater_equal(instants, MIN_TIMESTAMP_US), pc.less_equal(instants, MAX_TIMESTAMP_US))
        add(passes, OUT_OF_RANGE, "is outside years 1 to 9999")
    if column.minimum is not None:
        add(
            _compare(pc.greater_equal, values, column, column.minimum),
            OUT_OF_RANGE,
            f"must be at least {column.minimum:g}",
        )
    if column.maximum is not None:
        add(
            _compare(pc.less_equal, values, column, column.maximum), OUT_OF_RANGE, f"must be at most {column.maximum:g}"
        )
    if column.allowed:
        passes = pc.if_else(pc.is_null(values), None, pc.is_in(values, value_set=pa.array(column.allowed)))
        add(passes, NOT_ALLOWED_VALUE, f"is none of the {len(column.allowed)} allowed values")
    if column.pattern:
        passes = pc.match_substring_regex(values, full_pattern(column.pattern))
        add(passes, PATTERN_MISMATCH, f"does not match {column.pattern}")
    return checks


def _compare(compare: pc.Function, values: pa.Array, column: Column, bound: float) -> pa.Array:
    if column.type is ColumnType.DOUBLE:
        return compare(values, bound)
    # Compared as integers: a float64 cannot tell neighbours above 2^53 apart.
    lower = compare is pc.greater_equal
    whole = int(np.ceil(bound)) if lower else int(np.floor(bound))
    outside = whole > _INT64_MAX if lower else whole < _INT64_MIN
    if outside:
        return pc.if_else(pc.is_null(values), None, False)
    return compare(values, pa.scalar(min(max(whole, _INT64_MIN), _INT64_MAX), pa.int64()))


def settle(contract: Contract, columns: Mapping[str, pa.Array], verdict: Verdict) -> tuple[pa.Table, Rows, U64, U64]:
    """The good rows of checked columns, where they were, and their event ids' hashes."""
    table = pa.table([columns[column.name] for column in contract.columns], schema=contract.arrow_schema())
    good = verdict.good()
    rows = np.arange(verdict.rows)
    if good is not None:
        table = table.filter(pa.array(good))
        rows = rows[good]
    ids = table.column(contract.event_id_column).combine_chunks()
    high, low = hash_strings(ids if isinstance(ids, pa.Array) else pa.concat_arrays(ids.chunks))
    return table, rows, high, low


def empty_column(column: Column, rows: int) -> pa.Array:
    """A column of nulls."""
    return pa.nulls(rows, ARROW_TYPES[column.type])


def _mask(values: pa.Array) -> Mask:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.bool_)
