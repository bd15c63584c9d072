"""Whether a contract is one, by itself; every wrong field is refused by name."""

import math
import re
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

from millrace_ingestion.contracts import NUMBERS, QUARANTINE_SUFFIX, Column, ColumnType, Contract, full_pattern
from millrace_ingestion.rules import OF_ANY_COLUMN, Comparison, Expectation, Statistic

MAX_COLUMNS = 500
MAX_ALLOWED = 10_000
MAX_PATTERN = 1_000
MAX_RULES = 200
_COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")


def validate(contract: Contract, field: str) -> Contract:
    """Check a contract by itself; `field` is the path of the contract in the request.

    Raises:
        InvalidArgumentError: naming the field that is wrong.
    """
    check.table(contract.name, f"{field}.name")
    if contract.name.endswith(QUARANTINE_SUFFIX):
        raise InvalidArgumentError(f"{field}.name", f"must not end with {QUARANTINE_SUFFIX!r} (reserved)")
    if not contract.columns:
        raise InvalidArgumentError(f"{field}.columns", "needs at least one column")
    if len(contract.columns) > MAX_COLUMNS:
        raise InvalidArgumentError(f"{field}.columns", f"has more than {MAX_COLUMNS} columns")
    seen: set[str] = set()
    for index, column in enumerate(contract.columns):
        place = f"{field}.columns[{index}]"
        if not _COLUMN.fullmatch(column.name):
            raise InvalidArgumentError(
                f"{place}.name",
                "needs 1 to 63 letters, digits or '_', starting with a letter ('_' starts reserved names)",
            )
        if column.name.lower() in seen:
            raise InvalidArgumentError(
                f"{place}.name", f"{column.name!r} is there twice (upper and lower case count as one)"
            )
        seen.add(column.name.lower())
        _validate_checks(column, place)
    by_name = {column.name: column for column in contract.columns}
    _validate_role(by_name, contract.event_id_column, ColumnType.STRING, f"{field}.event_id_column")
    _validate_role(by_name, contract.event_time_column, ColumnType.TIMESTAMP, f"{field}.event_time_column")
    for index, name in enumerate(contract.key_columns):
        if name not in by_name:
            raise InvalidArgumentError(f"{field}.key_columns[{index}]", f"{name!r} is no column of the contract")
        if by_name[name].type is ColumnType.FLOAT_LIST:
            raise InvalidArgumentError(f"{field}.key_columns[{index}]", f"{name!r} is a list, which is no key")
    if len(set(contract.key_columns)) != len(contract.key_columns):
        raise InvalidArgumentError(f"{field}.key_columns", "names a column twice")
    _validate_rules(contract, by_name, field)
    return contract


def _validate_role(by_name: dict[str, Column], name: str, kind: ColumnType, field: str) -> None:
    column = by_name.get(name)
    if column is None:
        raise InvalidArgumentError(field, f"{name!r} is no column of the contract")
    if column.type is not kind or column.nullable:
        raise InvalidArgumentError(field, f"{name!r} must be a {kind.value} column that is not nullable")


def _validate_checks(column: Column, place: str) -> None:
    _validate_kinds(column, place)
    for low, high, name in (
        (column.minimum, column.maximum, "min"),
        (column.min_length, column.max_length, "min_length"),
    ):
        if low is not None and high is not None and low > high:
            raise InvalidArgumentError(f"{place}.{name}", f"is greater than {name.replace('min', 'max')}")
    for name, limit in (("min", column.minimum), ("max", column.maximum)):
        if limit is not None:
            check.finite(limit, f"{place}.{name}")
    for name, length in (("min_length", column.min_length), ("max_length", column.max_length)):
        if length is not None and length < 0:
            raise InvalidArgumentError(f"{place}.{name}", "must not be negative")
    for name, seconds in (("max_age_s", column.max_age_s), ("max_ahead_s", column.max_ahead_s)):
        if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
            raise InvalidArgumentError(f"{place}.{name}", "must be a finite number that is not negative")
    rate = column.max_null_rate
    if rate is not None and not 0 <= rate <= 1:
        raise InvalidArgumentError(f"{place}.max_null_rate", "must be 0 to 1")
    if rate is not None and not column.nullable:
        raise InvalidArgumentError(f"{place}.max_null_rate", f"is for nullable columns, and {column.name!r} is not")
    for name, count in (("allowed", len(column.allowed)), ("allowed_numbers", len(column.allowed_numbers))):
        if count > MAX_ALLOWED:
            raise InvalidArgumentError(f"{place}.{name}", f"has more than {MAX_ALLOWED} values")
    if column.pattern:
        _validate_pattern(column, f"{place}.pattern")


def _validate_kinds(column: Column, place: str) -> None:
    """Refuse a check that is for columns of another type."""
    strings, timestamps, whole = {ColumnType.STRING}, {ColumnType.TIMESTAMP}, {ColumnType.INT64}
    sized = {ColumnType.STRING, ColumnType.FLOAT_LIST}
    for name, given, kinds, called in (
        ("min", column.minimum is not None, NUMBERS, "numbers"),
        ("max", column.maximum is not None, NUMBERS, "numbers"),
        ("allowed", bool(column.allowed), strings, "strings"),
        ("pattern", bool(column.pattern), strings, "strings"),
        ("min_length", column.min_length is not None, sized, "strings and lists"),
        ("max_length", column.max_length is not None, sized, "strings and lists"),
        ("unique", column.unique, set(ColumnType) - {ColumnType.FLOAT_LIST}, "single values"),
        ("allowed_numbers", bool(column.allowed_numbers), whole, "whole numbers"),
        ("max_age_s", column.max_age_s is not None, timestamps, "timestamps"),
        ("max_ahead_s", column.max_ahead_s is not None, timestamps, "timestamps"),
    ):
        if given and column.type not in kinds:
            raise InvalidArgumentError(
                f"{place}.{name}", f"is for {called}, and {column.name!r} is {column.type.value}"
            )


def _validate_pattern(column: Column, field: str) -> None:
    if len(column.pattern) > MAX_PATTERN:
        raise InvalidArgumentError(field, f"is longer than {MAX_PATTERN} characters")
    try:
        pc.match_substring_regex(pa.array(["x"]), full_pattern(column.pattern))
    except pa.ArrowException as error:
        raise InvalidArgumentError(field, f"is no RE2 pattern: {error}") from None


def _validate_rules(contract: Contract, by_name: Mapping[str, Column], field: str) -> None:
    if len(contract.comparisons) + len(contract.expectations) > MAX_RULES:
        raise InvalidArgumentError(f"{field}.expectations", f"there are more than {MAX_RULES} rules")
    names: set[str] = set()
    for index, comparison in enumerate(contract.comparisons):
        place = f"{field}.comparisons[{index}]"
        _validate_name(comparison.name, {*names, *by_name}, place)
        names.add(comparison.name)
        _validate_comparison(comparison, by_name, place)
    for index, expectation in enumerate(contract.expectations):
        place = f"{field}.expectations[{index}]"
        _validate_name(expectation.name, {*names, *by_name}, place)
        names.add(expectation.name)
        _validate_expectation(expectation, by_name, place)


def _validate_name(name: str, taken: set[str], place: str) -> None:
    if not _COLUMN.fullmatch(name):
        raise InvalidArgumentError(f"{place}.name", "needs 1 to 63 letters, digits or '_', starting with a letter")
    if name in taken:
        raise InvalidArgumentError(f"{place}.name", f"{name!r} is there twice (columns and rules share names)")


def _validate_comparison(comparison: Comparison, by_name: Mapping[str, Column], place: str) -> None:
    left = by_name.get(comparison.left)
    if left is None:
        raise InvalidArgumentError(f"{place}.left", f"{comparison.left!r} is no column of the contract")
    if not isinstance(comparison.right, str):
        check.finite(comparison.right, f"{place}.number")
        if left.type not in NUMBERS:
            raise InvalidArgumentError(f"{place}.number", f"{left.name!r} is {left.type.value}, no number")
        return
    right = by_name.get(comparison.right)
    if right is None:
        raise InvalidArgumentError(f"{place}.column", f"{comparison.right!r} is no column of the contract")
    if left.type is not right.type and not {left.type, right.type} <= NUMBERS:
        kinds = f"{left.name!r} is {left.type.value} and {right.name!r} is {right.type.value}"
        raise InvalidArgumentError(f"{place}.column", f"cannot be compared: {kinds}")


def _validate_expectation(expectation: Expectation, by_name: Mapping[str, Column], place: str) -> None:
    kind = expectation.statistic
    if kind is Statistic.ROW_COUNT:
        if expectation.column:
            raise InvalidArgumentError(f"{place}.column", "is not for ROW_COUNT")
    elif (column := by_name.get(expectation.column)) is None:
        raise InvalidArgumentError(f"{place}.column", f"{expectation.column!r} is no column of the contract")
    elif kind is Statistic.DISTINCT and column.type is ColumnType.FLOAT_LIST:
        raise InvalidArgumentError(f"{place}.column", f"{column.name!r} is a list; lists are not told apart")
    elif kind not in OF_ANY_COLUMN and column.type not in NUMBERS:
        raise InvalidArgumentError(f"{place}.column", f"{column.name!r} is {column.type.value}, no number")
    if (kind is Statistic.QUANTILE) != (expectation.quantile is not None):
        raise InvalidArgumentError(f"{place}.quantile", "is for QUANTILE, and QUANTILE needs it")
    if expectation.quantile is not None and not 0 <= expectation.quantile <= 1:
        raise InvalidArgumentError(f"{place}.quantile", "must be 0 to 1")
    if expectation.minimum is None and expectation.maximum is None:
        raise InvalidArgumentError(f"{place}.min", "needs min or max")
    for name, bound in (("min", expectation.minimum), ("max", expectation.maximum)):
        if bound is not None:
            check.finite(bound, f"{place}.{name}")
    if None not in (expectation.minimum, expectation.maximum) and expectation.minimum > expectation.maximum:  # type: ignore[operator]
        raise InvalidArgumentError(f"{place}.min", "is greater than max")
    if expectation.min_rows < 1:
        raise InvalidArgumentError(f"{place}.min_rows", "must not be negative")
