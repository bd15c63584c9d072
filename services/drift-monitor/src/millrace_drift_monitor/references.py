"""Makes a reference profile from a training set: read column by column, so that memory is one column, not the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from millrace_kit.errors import InvalidArgumentError

from millrace_drift_monitor.profiles import (
    Profile,
    block_rows,
    group_rows,
    natural_effect,
    profile_column,
    rate_differences,
)
from millrace_drift_monitor.records import MICROS
from millrace_drift_monitor.sketches import Floats, Layout

EVENT_TIME = "event_time"


@dataclass(frozen=True, slots=True)
class ReferenceSpec:
    """What a reference is made from, beside the file.

    Args:
        feature_names: columns in vector order.
        label_column: bool or 0/1 column; empty for none.
        predictions: held-out predictions, shape (n,).
        correct: 1 where a held-out prediction was right, shape (n,) or empty.
        accuracy: on held-out rows.
        window_s: length of the monitor's windows.
        min_count: rows a window needs.
        min_windows: reference windows needed to say what is natural.
        max_rows: largest accepted training set.
    """

    feature_names: Sequence[str]
    label_column: str
    predictions: Floats
    correct: Floats
    accuracy: float | None
    window_s: int
    min_count: int
    min_windows: int
    max_rows: int


def build_profile(path: Path, spec: ReferenceSpec) -> Profile:
    """The profile of the Parquet file at `path`.

    Raises:
        InvalidArgumentError: the file is no Parquet, too large, empty, or lacks a column or its type.
    """
    try:
        with pq.ParquetFile(path) as file:
            return _profile(file, spec)
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidArgumentError("data", f"is no readable Parquet file: {error}") from error


def _profile(file: pq.ParquetFile, spec: ReferenceSpec) -> Profile:
    rows: int = file.metadata.num_rows
    if not 0 < rows <= spec.max_rows:
        raise InvalidArgumentError("data", f"has {rows} rows, accepted are 1 to {spec.max_rows}")
    names = set(file.schema_arrow.names)
    for index, name in enumerate(spec.feature_names):
        if name not in names:
            raise InvalidArgumentError(f"feature_names[{index}]", f"is no column of the training set: {name!r}")
    if spec.label_column and spec.label_column not in names:
        raise InvalidArgumentError("label_column", f"is no column of the training set: {spec.label_column!r}")
    times = _times(file) if EVENT_TIME in names else None
    groups, count = group_rows(times, spec.window_s * MICROS, spec.min_count, spec.min_windows)
    owner = groups if groups is not None else np.full(rows, -1, dtype=np.int64)
    columns = [
        profile_column(_numbers(file, name, f"feature_names[{index}]"), owner, count)
        for index, name in enumerate(spec.feature_names)
    ]
    # Held-out predictions carry no times: blocks as long as the reference's windows stand in for them.
    blocks, block_count = block_rows(len(spec.predictions), rows // count if count else 0, spec.min_windows)
    if blocks is None:
        blocks = np.full(len(spec.predictions), -1, dtype=np.int64)
    columns.append(profile_column(spec.predictions, blocks, block_count))
    natural_accuracy = 0.0
    if block_count and len(spec.correct):
        natural_accuracy = max(0.0, natural_effect(-rate_differences(spec.correct, blocks, block_count)))
    labels = _labels(file, spec.label_column) if spec.label_column else np.empty(0)
    known = labels[~np.isnan(labels)]
    return Profile(
        feature_names=tuple(spec.feature_names),
        layout=Layout.of([column.bins for column in columns]),
        sketch=np.concatenate([column.counts for column in columns]),
        rows=rows,
        labels=len(known),
        positives=int(known.sum()),
        accuracy=spec.accuracy,
        predictions=len(spec.predictions),
        natural=np.stack([column.natural for column in columns]),
        natural_label=natural_effect(np.abs(rate_differences(labels, owner, count))) if count and len(known) else 0.0,
        natural_accuracy=natural_accuracy,
        natural_windows=count,
    )


def _numbers(file: pq.ParquetFile, name: str, field: str) -> Floats:
    """A column as float64 with NaN for null."""
    column = file.read(columns=[name]).column(0)
    kind = column.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise InvalidArgumentError(field, f"column {name!r} holds {kind}, not numbers")
    return _float64(column)


def _float64(column: Any) -> Floats:
    numbers = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.array(numbers, dtype=np.float64)


def _labels(file: pq.ParquetFile, name: str) -> Floats:
    labels = _numbers(file, name, "label_column")
    if not np.all(np.isnan(labels) | (labels == 0) | (labels == 1)):
        raise InvalidArgumentError("label_column", f"column {name!r} holds other values than true and false")
    return labels


def _times(file: pq.ParquetFile) -> npt.NDArray[np.int64] | None:
    """Event times in microseconds; None when the column is of another type or has nulls."""
    column = file.read(columns=[EVENT_TIME]).column(0)
    if not pa.types.is_timestamp(column.type) or column.null_count:
        return None
    stamps = pc.cast(pc.cast(column, pa.timestamp("us", tz=column.type.tz), safe=False), pa.int64())
    return np.array(stamps.to_numpy(zero_copy_only=False), dtype=np.int64)
