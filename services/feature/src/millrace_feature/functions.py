"""Aggregation functions: the names users write (Feast's, Spark's, Tecton's), and what a tile must hold for each."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Part = Literal["spread", "first", "last", "distinct", "percentile"]
"""What a tile of a column may hold besides count, sum, smallest and largest value."""

NAMES: Mapping[str, str] = {
    "count": "count",
    "sum": "sum",
    "mean": "mean",
    "avg": "mean",
    "min": "min",
    "max": "max",
    "std": "std",
    "stddev": "std",
    "stddev_samp": "std",
    "stddev_pop": "std_pop",
    "var": "var",
    "variance": "var",
    "var_samp": "var",
    "var_pop": "var_pop",
    "first": "first",
    "last": "last",
    "approx_count_distinct": "distinct",
}
"""What users write -> canonical name. `std` and `var` are of a sample (missing below two values), as in Feast."""
KNOWN = "count, sum, mean, min, max, std, var, stddev_pop, var_pop, first, last, approx_count_distinct, p1 to p99"
ZERO_WHEN_EMPTY = frozenset({"count", "distinct"})
"""Of an empty window these are 0, everything else is missing."""

_PARTS: Mapping[str, Part] = {
    "std": "spread",
    "var": "spread",
    "std_pop": "spread",
    "var_pop": "spread",
    "first": "first",
    "last": "last",
    "distinct": "distinct",
}
_PERCENT = re.compile(r"p(\d{1,2}(?:\.\d{1,3})?|100)")
_QUANTILE = re.compile(r"approx_percentile\(\s*(0(?:\.\d{1,5})?|\.\d{1,5}|1(?:\.0{1,5})?)\s*\)")


def canonical(name: str) -> str | None:
    """The function called `name`; None when there is none.

    Percentiles are written `p95`, `p99.9` or `approx_percentile(0.95)`.
    """
    if name in NAMES:
        return NAMES[name]
    if name == "median":
        return "p50"
    if found := _PERCENT.fullmatch(name):
        percent = Decimal(found.group(1))
    elif found := _QUANTILE.fullmatch(name):
        percent = Decimal(found.group(1)) * 100
    else:
        return None
    return f"p{percent.normalize():f}"


def part_of(function: str) -> Part | None:
    """What a canonical function needs of a tile besides what each holds."""
    return "percentile" if function[0] == "p" else _PARTS.get(function)


def quantile_of(function: str) -> float:
    """0.95 of `p95`."""
    return float(Decimal(function[1:]) / 100)


@dataclass(frozen=True, slots=True)
class Schema:
    """What a tile holds: of each column count, sum, smallest and largest value, and of some columns more."""

    columns: tuple[str, ...]
    spread: tuple[int, ...] = ()
    """Numbers of the columns with a sum of squared deviations."""
    first: tuple[int, ...] = ()
    """Columns with their first value and its time."""
    last: tuple[int, ...] = ()
    sketches: tuple[tuple[int, Part], ...] = ()
    """(column, kind) of each sketch; its place is the sketch's number."""

    @classmethod
    def of(cls, aggregates: Iterable[tuple[str, str]]) -> "Schema":
        """What (column, canonical function) pairs need."""
        pairs = sorted(set(aggregates))
        columns = tuple(sorted({column for column, _function in pairs}))
        needed = sorted({(columns.index(c), part) for c, f in pairs if (part := part_of(f)) is not None})

        def having(wanted: Part) -> tuple[int, ...]:
            return tuple(c for c, part in needed if part == wanted)

        sketches = tuple((c, part) for c, part in needed if part in {"distinct", "percentile"})
        return cls(columns, having("spread"), having("first"), having("last"), sketches)

    @property
    def numbers(self) -> int:
        """Float64 values a tile takes."""
        return 4 * len(self.columns) + len(self.spread) + 2 * (len(self.first) + len(self.last))

    @property
    def is_plain(self) -> bool:
        """Whether tiles hold nothing but count, sum, smallest and largest value."""
        return not (self.spread or self.first or self.last or self.sketches)


def columns_with(schema: Schema, part: Part) -> list[int]:
    """The columns whose tiles hold `part`."""
    if part in {"distinct", "percentile"}:
        return [column for column, kind in schema.sketches if kind == part]
    return list({"spread": schema.spread, "first": schema.first, "last": schema.last}[part])
