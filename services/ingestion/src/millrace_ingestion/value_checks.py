"""Checks of single values, and of two values of one record, on whole columns: which of them pass.

A null passes. NaN and infinities pass unless the column has a bound, which they fail.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace_ingestion.contracts import Column, ColumnType, full_pattern
from millrace_ingestion.rules import ALLOWED, FRESHNESS, LENGTH, PATTERN, RANGE, UNIQUE, Comparison, Operator

OUT_OF_RANGE = "OUT_OF_RANGE"
NOT_ALLOWED_VALUE = "NOT_ALLOWED_VALUE"
PATTERN_MISMATCH = "PATTERN_MISMATCH"
WRONG_LENGTH = "WRONG_LENGTH"
NOT_UNIQUE = "NOT_UNIQUE"
NOT_FRESH = "NOT_FRESH"

# Years 1 to 9999, what the readers' date types can hold; microseconds since the epoch.
MIN_TIMESTAMP_US = -62_135_596_800_000_000
MAX_TIMESTAMP_US = 253_402_300_799_999_999
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_OPERATORS = {
    Operator.LESS: pc.less,
    Operator.LESS_EQUAL: pc.less_equal,
    Operator.EQUAL: pc.equal,
    Operator.NOT_EQUAL: pc.not_equal,
    Operator.GREATER_EQUAL: pc.greater_equal,
    Operator.GREATER: pc.greater,
}
Now = int | npt.NDArray[np.int64] | None
ValueCheck = tuple[str, pa.Array, str, str]
"""The check's name, which values pass (null where the value is), and the reason and detail of a failure."""


def value_checks(column: Column, values: pa.Array, now_us: Now, *, batch: bool) -> Iterator[ValueCheck]:
    """The checks of a column.

    Args:
        column: the checks.
        values: in the column's Arrow type.
        now_us: when the records came; None checks no freshness.
        batch: whether uniqueness is asked.
    """
    if column.type is ColumnType.TIMESTAMP:
        instants = values.view(pa.int64())
        # Never to be chosen: readers could not even show such a value.
        passes = pc.and_(pc.greater_equal(instants, MIN_TIMESTAMP_US), pc.less_equal(instants, MAX_TIMESTAMP_US))
        yield "", passes, OUT_OF_RANGE, "is outside years 1 to 9999"
        yield from _freshness(column, instants, now_us)
    if column.type is ColumnType.FLOAT_LIST:
        # Never to be chosen either: no distance to such a vector would be a number.
        yield "", _all_finite(values), OUT_OF_RANGE, "holds a null or a number that 32 bits cannot hold"
    if column.minimum is not None:
        detail = f"must be at least {column.minimum:g}"
        yield RANGE, _bounded(pc.greater_equal, values, column, column.minimum), OUT_OF_RANGE, detail
    if column.maximum is not None:
        detail = f"must be at most {column.maximum:g}"
        yield RANGE, _bounded(pc.less_equal, values, column, column.maximum), OUT_OF_RANGE, detail
    if column.min_length is not None or column.max_length is not None:
        yield from _length(column, values)
    for allowed in (column.allowed, column.allowed_numbers):
        if allowed:
            passes = pc.if_else(pc.is_null(values), None, pc.is_in(values, value_set=pa.array(allowed, values.type)))
            yield ALLOWED, passes, NOT_ALLOWED_VALUE, f"is none of the {len(allowed)} allowed values"
    if column.pattern:
        passes = pc.match_substring_regex(values, full_pattern(column.pattern))
        yield PATTERN, passes, PATTERN_MISMATCH, f"does not match {column.pattern}"
    if column.unique and batch:
        yield UNIQUE, _first_copies(values), NOT_UNIQUE, "stands more than once in the batch"


def _freshness(column: Column, instants: pa.Array, now_us: Now) -> Iterator[ValueCheck]:
    if now_us is None:
        return
    now = pa.scalar(now_us) if isinstance(now_us, int) else pa.array(now_us)
    # Bounds instead of differences, which could overflow.
    if column.max_age_s is not None:
        oldest = pc.subtract(now, math.ceil(column.max_age_s * 1_000_000))
        detail = f"is more than {column.max_age_s:g} s old"
        yield FRESHNESS, pc.greater_equal(instants, oldest), NOT_FRESH, detail
    if column.max_ahead_s is not None:
        newest = pc.add(now, math.floor(column.max_ahead_s * 1_000_000))
        detail = f"is more than {column.max_ahead_s:g} s ahead"
        yield FRESHNESS, pc.less_equal(instants, newest), NOT_FRESH, detail


def _length(column: Column, values: pa.Array) -> Iterator[ValueCheck]:
    is_list = column.type is ColumnType.FLOAT_LIST
    lengths = pc.list_value_length(values) if is_list else pc.utf8_length(values)
    unit = "numbers" if is_list else "characters"
    if column.min_length is not None:
        detail = f"must have at least {column.min_length} {unit}"
        yield LENGTH, pc.greater_equal(lengths, column.min_length), WRONG_LENGTH, detail
    if column.max_length is not None:
        detail = f"must have at most {column.max_length} {unit}"
        yield LENGTH, pc.less_equal(lengths, column.max_length), WRONG_LENGTH, detail


def _all_finite(values: pa.ListArray) -> pa.Array:
    """Whether every number of each list is there and finite; null where the list is."""
    finite = pc.fill_null(pc.is_finite(values.values), False).to_numpy(zero_copy_only=False)
    strange = np.r_[0, np.cumsum(~finite)]
    offsets = values.offsets.to_numpy()
    return pc.if_else(values.is_null(), None, pa.array(strange[offsets[1:]] == strange[offsets[:-1]]))


def _bounded(compare_: pc.Function, values: pa.Array, column: Column, bound: float) -> pa.Array:
    if column.type is ColumnType.DOUBLE:
        return compare_(values, bound)
    # Compared as integers: a float64 cannot tell neighbours above 2^53 apart.
    lower = compare_ is pc.greater_equal
    whole = int(np.ceil(bound)) if lower else int(np.floor(bound))
    outside = whole > _INT64_MAX if lower else whole < _INT64_MIN
    if outside:
        return pc.if_else(pc.is_null(values), None, False)
    return compare_(values, pa.scalar(min(max(whole, _INT64_MIN), _INT64_MAX), pa.int64()))


def _first_copies(values: pa.Array) -> pa.Array:
    """True for the first copy of each value and for nulls, false for later copies."""
    codes = values.dictionary_encode().indices
    if len(values) - values.null_count == pc.count_distinct(codes, mode="only_valid").as_py():
        return pa.repeat(True, len(values))
    _codes, firsts = np.unique(pc.fill_null(codes, -1).to_numpy(zero_copy_only=False), return_index=True)
    passes = np.asarray(values.is_null().to_numpy(zero_copy_only=False), np.bool_)
    passes[firsts] = True
    return pa.array(passes)


def compare(rule: Comparison, columns: Mapping[str, pa.Array]) -> pa.Array:
    """Which records a comparison passes; null where either side is. NaN is unequal to everything, itself too."""
    left = columns[rule.left]
    if isinstance(rule.right, str):
        right = columns[rule.right]
    else:
        # Exact for whole numbers, so that integers beyond 2^53 compare as integers.
        whole = rule.right.is_integer() and abs(rule.right) <= 2**63 - 1024
        right = pa.scalar(int(rule.right) if whole and pa.types.is_integer(left.type) else rule.right)
    return _OPERATORS[rule.operator](left, right)
