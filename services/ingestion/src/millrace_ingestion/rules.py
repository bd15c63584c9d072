"""What a contract asks of more than one value: policies of checks, comparisons of columns, expectations of batches."""

from dataclasses import dataclass
from enum import Enum


class Policy(Enum):
    """What happens when a check fails; the value is the name in the `.proto` without its prefix."""

    REJECT = "REJECT"
    QUARANTINE = "QUARANTINE"
    WARN = "WARN"

    @property
    def strictness(self) -> int:
        """Higher lets less into the table."""
        return {"WARN": 0, "QUARANTINE": 1, "REJECT": 2}[self.value]


RANGE, ALLOWED, PATTERN, LENGTH = "range", "allowed", "pattern", "length"
UNIQUE, FRESHNESS, NULL_RATE = "unique", "freshness", "null_rate"
CHOOSABLE = (RANGE, ALLOWED, PATTERN, LENGTH, UNIQUE, FRESHNESS, NULL_RATE)
"""Checks of a column whose policy a contract may choose; what is no value of the column's type can only be rejected."""


class Operator(Enum):
    """How two values compare."""

    LESS = "<"
    LESS_EQUAL = "<="
    EQUAL = "=="
    NOT_EQUAL = "!="
    GREATER_EQUAL = ">="
    GREATER = ">"


@dataclass(frozen=True)
class Comparison:
    """How a column compares with another one or with a number, in every record."""

    name: str
    left: str
    operator: Operator
    right: str | float
    """A column's name, or a number."""
    policy: Policy = Policy.REJECT

    def __str__(self) -> str:
        right = self.right if isinstance(self.right, str) else f"{self.right:g}"
        return f"{self.left} {self.operator.value} {right}"


class Statistic(Enum):
    """What an expectation is about; the value is the name in the `.proto` without its prefix."""

    ROW_COUNT = "ROW_COUNT"
    NULL_RATE = "NULL_RATE"
    MIN = "MIN"
    MAX = "MAX"
    MEAN = "MEAN"
    SUM = "SUM"
    STDDEV = "STDDEV"
    QUANTILE = "QUANTILE"
    DISTINCT = "DISTINCT"


OF_ANY_COLUMN = frozenset({Statistic.NULL_RATE, Statistic.DISTINCT})
"""Statistics of columns that need not be numbers."""


@dataclass(frozen=True)
class Expectation:
    """Bounds of a statistic over a batch, inclusive."""

    name: str
    statistic: Statistic
    column: str = ""
    """Empty for ROW_COUNT."""
    quantile: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    min_rows: int = 1
    """Batches with fewer records that passed their own checks are not judged."""
    policy: Policy = Policy.REJECT

    def __str__(self) -> str:
        at = f", {self.quantile:g}" if self.quantile is not None else ""
        return f"{self.statistic.value.lower()}({self.column}{at})"
