"""Historical features: those of rows that a caller gives, as of each row's instant, by the code of training sets."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError

from millrace_feature.lake import NO_TABLE, Lake
from millrace_feature.named import named_plan
from millrace_feature.plan import Definitions
from millrace_feature.tiles import MICROSECONDS
from millrace_feature.training import Build, Labels, carried_names

MAX_ROWS = 1_000_000
"""Rows of one request."""


@dataclass(frozen=True, slots=True)
class Historical:
    """Features of the rows, and what they were read from."""

    features: pa.Table
    versions: Mapping[str, int]


def historical_features(
    lake: Lake,
    definitions: Definitions,
    names: list[str],
    rows: pa.Table,
    *,
    event_time: str,
    pinned: Mapping[str, int],
) -> Historical:
    """The features `names` ("view__feature") of `rows`, one row each in their order.

    Args:
        lake: where the views' tables are.
        definitions: where the features are looked for.
        names: in the order of the result's columns.
        rows: the instants in column `event_time` (without a zone they are UTC), join keys and request fields by name.
        event_time: name of the instants' column.
        pinned: versions of tables; the newest of those that are not named.

    Raises:
        InvalidArgumentError: a feature is unknown, a column is missing, or an instant is null.
        FailedPreconditionError: a table does not exist or lacks a column.
    """
    plan = named_plan(definitions, names, None)
    carried = carried_names(plan)
    for column in (event_time, *carried):
        if column not in rows.column_names:
            raise InvalidArgumentError("rows", f"needs a column {column!r}")
        if pa.types.is_nested(rows.column(column).type):
            raise InvalidArgumentError("rows", f"has a column {column!r} that holds more than single values")
    if rows.num_rows > MAX_ROWS:
        raise InvalidArgumentError("rows", f"holds more than {MAX_ROWS} rows")
    instants = rows.column(event_time)
    if not pa.types.is_timestamp(instants.type) or instants.null_count:
        raise InvalidArgumentError("rows", f"needs timestamps without nulls in column {event_time!r}")
    given = {f"in{i}": rows.column(name) for i, name in enumerate(carried)}
    asked = pa.table({"at_us": instants.cast(MICROSECONDS, safe=False).cast(pa.int64()), **given})
    tables = sorted({definitions.view(use.view).contract for use in plan.uses})
    if strange := sorted(set(pinned) - set(tables)):
        raise InvalidArgumentError("table_versions", f"{strange[0]!r} is none of the tables read")
    if negative := [table for table, version in pinned.items() if version < 0]:
        raise InvalidArgumentError("table_versions", f"the version of {negative[0]!r} must not be negative")
    versions = {table: pinned.get(table, -1) for table in tables}
    versions = {table: lake.newest_version(table) if v < 0 else v for table, v in versions.items()}
    if missing := [table for table, version in versions.items() if version == NO_TABLE]:
        raise FailedPreconditionError(
            "TABLE_MISSING", f"table {missing[0]!r} does not exist yet", {"table": missing[0]}
        )
    labels = Labels("", "", "", "", start_us=None, end_us=None, known_at_us=None)
    made = Build(lake, plan, definitions, labels, max_rows=rows.num_rows).columns(versions, asked)
    return Historical(pa.table({name: _plain(made[name]) for name in plan.features}), versions)


def _plain(column: object) -> pa.ChunkedArray | pa.Array:
    """The feature with NaN as null."""
    if isinstance(column, np.ndarray):
        return pa.array(column, pa.float64(), from_pandas=True)
    return column
