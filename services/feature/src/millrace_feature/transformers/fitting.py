"""Learning a transformer from the Parquet file of a training set, a row group at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace_feature.transformers.applying import folds_of, run_steps
from millrace_feature.transformers.artifact import (
    KINDS,
    MAX_BYTES,
    MAX_STEPS,
    Artifact,
    Origin,
    Specification,
    SpecificationError,
)
from millrace_feature.transformers.columns import NAN, Batch, Column, Floats, as_floats
from millrace_feature.transformers.steps import State

BATCH_ROWS = 65_536
EVENT_TIME = "event_time"


class TrainingRows:
    """The rows of one set as one step sees them; see `columns.Rows`."""

    def __init__(
        self, path: Path, *, join_column: str, label_column: str, names: Sequence[str], before: Artifact
    ) -> None:
        self._path = path
        self._join, self._label = join_column, label_column
        self._before = before
        self.inputs = tuple(names)
        """Names of the columns of a batch."""
        self._sources: list[str | tuple[int, int]] = [before.live.get(name, name) for name in names]

    def batches(self) -> Iterator[Batch]:
        """Every row once, at most BATCH_ROWS at a time."""
        own = [s for s in self._sources if isinstance(s, str)]
        wanted = list(dict.fromkeys([*own, *self._before.inputs, self._join, self._label]))
        with pq.ParquetFile(self._path) as file:
            for part in file.iter_batches(BATCH_ROWS, columns=wanted):
                columns = {name: column_of(part.column(name)) for name in wanted}
                folds = folds_of(part.column(self._join).to_pylist())
                made = run_steps(self._before, columns, folds.tolist(), len(self._before.steps))
                chosen = [columns[s] if isinstance(s, str) else made[s[0]][s[1]] for s in self._sources]
                yield Batch(chosen, as_floats(columns[self._label]), folds)

    def numbers(self, place: int) -> Floats:
        """Input `place` whole, without missing values."""
        parts = [as_floats(batch.columns[place]) for batch in self.batches()]
        whole = np.concatenate(parts) if parts else np.zeros(0)
        return whole[~np.isnan(whole)]


def column_of(array: pa.Array) -> Column:
    """An Arrow column as steps see it: numbers as float64, else values."""
    kind = array.type
    if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return np.asarray(
            array.cast(pa.float64(), safe=False).fill_null(NAN).to_numpy(zero_copy_only=False), np.float64
        )
    values: list[Any] = array.to_pylist()
    return values


def fit(
    path: Path, specifications: Sequence[Specification], *, training_set: str, join_column: str, label_column: str
) -> Artifact:
    """Fit the steps in order, each on what the ones before it make of the rows.

    Args:
        path: the set's Parquet file: event_time, join column, features, label.
        specifications: checked steps.
        training_set: digest of the set.
        join_column: its join column.
        label_column: its label column.

    Raises:
        SpecificationError: a step cannot be fitted on these rows; the message names it.
    """
    if not 1 <= len(specifications) <= MAX_STEPS:
        raise SpecificationError(f"steps: needs 1 to {MAX_STEPS}")
    origin = _origin(path, training_set)
    known = set(pq.read_schema(path).names) - {EVENT_TIME, join_column, label_column}
    states: list[State] = []
    for number, given in enumerate(specifications):
        before = Artifact(specifications[:number], states, origin)
        if unknown := [n for n in given.inputs if n not in known and n not in before.live]:
            raise SpecificationError(f"steps[{number}].inputs: {unknown[0]!r} is no feature of the training set")
        rows = TrainingRows(path, join_column=join_column, label_column=label_column, names=given.inputs, before=before)
        kind = KINDS[given.kind]
        try:
            states.append(kind.fit(kind.Given.model_validate(dict(given.parameters)), rows))
        except (TypeError, ValueError) as error:
            raise SpecificationError(f"steps[{number}] ({given.kind}): {error}") from error
    artifact = Artifact(specifications, states, origin)
    try:
        size = len(artifact.content)
    except ValueError as error:  # a NaN among what was learned
        raise SpecificationError(f"what was learned is not finite: {error}") from error
    if size > MAX_BYTES:
        raise SpecificationError(f"what was learned takes {size >> 20} MiB, at most {MAX_BYTES >> 20} are kept")
    return artifact


def _origin(path: Path, training_set: str) -> Origin:
    first_us, last_us, rows = 0, 0, 0
    with pq.ParquetFile(path) as file:
        for part in file.iter_batches(BATCH_ROWS, columns=[EVENT_TIME]):
            times = part.column(EVENT_TIME).cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
            if len(times):
                first_us = min(first_us, int(times.min())) if rows else int(times.min())
                last_us = max(last_us, int(times.max())) if rows else int(times.max())
                rows += len(times)
    if rows == 0:
        raise SpecificationError("training_set: has no rows")
    return Origin(training_set, rows, first_us, last_us)
