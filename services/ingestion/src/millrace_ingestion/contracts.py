"""Data contracts: what producers promise.

Which contract is a contract is said in `validation.py`, which one may follow which in `compatibility.py`.
"""

from dataclasses import dataclass
from enum import Enum

import pyarrow as pa

from millrace_ingestion.rules import Comparison, Expectation, Policy

SOURCE_COLUMN = "_source"
OFFSET_COLUMN = "_offset"
QUARANTINE_SUFFIX = "__quarantine"
"""Ends the name of the table in which a contract's quarantined batches wait; no contract's name ends so."""


class ColumnType(Enum):
    """Type of a column; the value is the name in the `.proto` without its prefix."""

    STRING = "STRING"
    INT64 = "INT64"
    DOUBLE = "DOUBLE"
    BOOL = "BOOL"
    TIMESTAMP = "TIMESTAMP"
    FLOAT_LIST = "FLOAT_LIST"


ARROW_TYPES: dict[ColumnType, pa.DataType] = {
    ColumnType.STRING: pa.string(),
    ColumnType.INT64: pa.int64(),
    ColumnType.DOUBLE: pa.float64(),
    ColumnType.BOOL: pa.bool_(),
    ColumnType.TIMESTAMP: pa.timestamp("us", "UTC"),
    ColumnType.FLOAT_LIST: pa.list_(pa.float32()),
}
NUMBERS = frozenset({ColumnType.INT64, ColumnType.DOUBLE})


@dataclass(frozen=True)
class Column:
    """One column and its checks; bounds are inclusive, empty sets and patterns accept all."""

    name: str
    type: ColumnType
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    allowed: tuple[str, ...] = ()
    pattern: str = ""
    min_length: int | None = None
    """In characters, of a list in numbers, as is `max_length`."""
    max_length: int | None = None
    allowed_numbers: tuple[int, ...] = ()
    max_null_rate: float | None = None
    """Of a batch, 0 to 1."""
    unique: bool = False
    """Within a batch."""
    max_age_s: float | None = None
    """Before the time at which the batch arrives; `max_ahead_s` is behind it."""
    max_ahead_s: float | None = None
    policies: tuple[tuple[str, Policy], ...] = ()
    """By check, sorted; what is not named rejects."""

    def policy(self, check: str) -> Policy:
        """What happens when `check` fails."""
        return next((policy for name, policy in self.policies if name == check), Policy.REJECT)


class Compatibility(Enum):
    """Which versions may follow; the value is the name in the `.proto` without its prefix."""

    UNSPECIFIED = "UNSPECIFIED"
    BACKWARD = "BACKWARD"
    BACKWARD_TRANSITIVE = "BACKWARD_TRANSITIVE"
    FORWARD = "FORWARD"
    FORWARD_TRANSITIVE = "FORWARD_TRANSITIVE"
    FULL = "FULL"
    FULL_TRANSITIVE = "FULL_TRANSITIVE"
    NONE = "NONE"


@dataclass(frozen=True)
class Contract:
    """A schema with checks; `version` is 0 before registration."""

    name: str
    version: int
    columns: tuple[Column, ...]
    event_id_column: str
    event_time_column: str
    key_columns: tuple[str, ...] = ()
    compatibility: Compatibility = Compatibility.UNSPECIFIED
    """The mode for the version after this one."""
    comparisons: tuple[Comparison, ...] = ()
    expectations: tuple[Expectation, ...] = ()

    @property
    def judges_batches(self) -> bool:
        """Whether anything is asked of a batch as a whole, besides that values are unique."""
        return bool(self.expectations) or any(column.max_null_rate is not None for column in self.columns)

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
