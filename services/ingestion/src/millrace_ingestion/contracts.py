"""Data contracts: what producers promise, and which changes of a promise keep every landed record valid.

A new version may add nullable columns and loosen checks. Anything else would make records that have landed, or readers of the lake
table, wrong; it is refused with the column's name.
"""

import re
from dataclasses import dataclass
from enum import Enum

import pyarrow as pa
import pyarrow.compute as pc
from millrace_kit import check
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError

SOURCE_COLUMN = "_source"
OFFSET_COLUMN = "_offset"
MAX_COLUMNS = 500
MAX_ALLOWED = 10_000
MAX_PATTERN = 1_000
_COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")


class ColumnType(Enum):
    """Type of a column; the value is the name in the `.proto` without its prefix."""

    STRING = "STRING"
    INT64 = "INT64"
    DOUBLE = "DOUBLE"
    BOOL = "BOOL"
    TIMESTAMP = "TIMESTAMP"


ARROW_TYPES: dict[ColumnType, pa.DataType] = {
    ColumnType.STRING: pa.string(),
    ColumnType.INT64: pa.int64(),
    ColumnType.DOUBLE: pa.float64(),
    ColumnType.BOOL: pa.bool_(),
    ColumnType.TIMESTAMP: pa.timestamp("us", "UTC"),
}
NUMBERS = frozenset({ColumnType.INT64, ColumnType.DOUBLE})


@dataclass(frozen=True)
class Column:
    """One column and its checks; `minimum` and `maximum` are inclusive, empty `allowed` and `pattern` accept all."""

    name: str
    type: ColumnType
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    allowed: tuple[str, ...] = ()
    pattern: str = ""


@dataclass(frozen=True)
class Contract:
    """A schema with checks; `version` is 0 before registration."""

    name: str
    version: int
    columns: tuple[Column, ...]
    event_id_column: str
    event_time_column: str
    key_columns: tuple[str, ...] = ()

    def arrow_schema(self) -> pa.Schema:
        """The records' schema, in the contract's column order."""
        return pa.schema([pa.field(c.name, ARROW_TYPES[c.type]) for c in self.columns])

    def table_schema(self) -> pa.Schema:
        """The lake table's schema: the records' and the two bookkeeping columns."""
        schema = self.arrow_schema()
        return schema.append(pa.field(SOURCE_COLUMN, pa.string())).append(pa.field(OFFSET_COLUMN, pa.int64()))


def full_pattern(pattern: str) -> str:
    """The RE2 expression that matches a whole string."""
    return rf"\A(?:{pattern})\z"


def validate(contract: Contract, field: str) -> Contract:
    """Check a contract by itself; `field` is the path of the contract in the request.

    Raises:
        InvalidArgumentError: naming the field that is wrong.
    """
    check.table(contract.name, f"{field}.name")
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
    if len(set(contract.key_columns)) != len(contract.key_columns):
        raise InvalidArgumentError(f"{field}.key_columns", "names a column twice")
    return contract


def _validate_role(by_name: dict[str, Column], name: str, kind: ColumnType, field: str) -> None:
    column = by_name.get(name)
    if column is None:
        raise InvalidArgumentError(field, f"{name!r} is no column of the contract")
    if column.type is not kind or column.nullable:
        raise InvalidArgumentError(field, f"{name!r} must be a {kind.value} column that is not nullable")


def _validate_checks(column: Column, place: str) -> None:
    for bound, value in (("min", column.minimum), ("max", column.maximum)):
        if value is None:
            continue
        check.finite(value, f"{place}.{bound}")
        if column.type not in NUMBERS:
            raise InvalidArgumentError(
                f"{place}.{bound}", f"is for numbers, and {column.name!r} is {column.type.value}"
            )
    if column.minimum is not None and column.maximum is not None and column.minimum > column.maximum:
        raise InvalidArgumentError(f"{place}.min", "is greater than max")
    if column.allowed and column.type is not ColumnType.STRING:
        raise InvalidArgumentError(f"{place}.allowed", f"is for strings, and {column.name!r} is {column.type.value}")
    if len(column.allowed) > MAX_ALLOWED:
        raise InvalidArgumentError(f"{place}.allowed", f"has more than {MAX_ALLOWED} values")
    if column.pattern:
        _validate_pattern(column, f"{place}.pattern")


def _validate_pattern(column: Column, field: str) -> None:
    if column.type is not ColumnType.STRING:
        raise InvalidArgumentError(field, f"is for strings, and {column.name!r} is {column.type.value}")
    if len(column.pattern) > MAX_PATTERN:
        raise InvalidArgumentError(field, f"is longer than {MAX_PATTERN} characters")
    try:
        pc.match_substring_regex(pa.array(["x"]), full_pattern(column.pattern))
    except pa.ArrowException as error:
        raise InvalidArgumentError(field, f"is no RE2 pattern: {error}") from None


def check_evolution(old: Contract, new: Contract) -> None:
    """Whether `new` may follow `old`.

    Raises:
        FailedPreconditionError: with the column and the change that is not allowed.
    """
    for role, before, after in (
        ("event_id_column", old.event_id_column, new.event_id_column),
        ("event_time_column", old.event_time_column, new.event_time_column),
        ("key_columns", ", ".join(old.key_columns), ", ".join(new.key_columns)),
    ):
        if before != after:
            raise _refused(old, before, f"{role} cannot change (was {before!r}, would be {after!r})")
    later = {column.name: column for column in new.columns}
    for column in old.columns:
        if column.name not in later:
            raise _refused(old, column.name, "a column cannot be removed")
        _check_loosened(old, column, later.pop(column.name))
    known = {column.name.lower() for column in old.columns}
    for added in later.values():
        if not added.nullable:
            raise _refused(old, added.name, "a new column must be nullable: records that have landed have no value")
        if added.name.lower() in known:
            raise _refused(old, added.name, "differs from another column only in case")


def _check_loosened(contract: Contract, old: Column, new: Column) -> None:
    if old.type is not new.type:
        raise _refused(contract, old.name, f"the type cannot change ({old.type.value} to {new.type.value})")
    if old.nullable and not new.nullable:
        raise _refused(contract, old.name, "a nullable column cannot become required")
    if new.minimum is not None and (old.minimum is None or new.minimum > old.minimum):
        raise _refused(contract, old.name, "min can only be lowered or removed")
    if new.maximum is not None and (old.maximum is None or new.maximum < old.maximum):
        raise _refused(contract, old.name, "max can only be raised or removed")
    if new.allowed and (not old.allowed or not set(old.allowed) <= set(new.allowed)):
        raise _refused(contract, old.name, "allowed can only gain values or be removed")
    if new.pattern and new.pattern != old.pattern:
        raise _refused(contract, old.name, "pattern can only be removed: nobody can prove that another one is looser")


def _refused(contract: Contract, column: str, change: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        "INCOMPATIBLE_CONTRACT",
        f"contract {contract.name!r}, column {column!r}: {change}",
        {"contract": contract.name, "column": column, "change": change},
    )
