"""The one function that applies a fitted transformer: reads call it with a few rows, training sets with slices of columns."""

from collections.abc import Mapping, Sequence

import mmh3
import numpy as np

from millrace_feature.transformers.artifact import Artifact
from millrace_feature.transformers.columns import Column, Floats, Ints


def transformed(
    artifact: Artifact, columns: Mapping[str, Column], folds: Sequence[int] | None = None
) -> dict[str, Floats]:
    """Outputs by name, in order; NaN where missing.

    Args:
        artifact: what was fitted.
        columns: `artifact.inputs` by name, one value a row.
        folds: fold of each row that the transformer was fitted on, -1 for others; None: it was fitted on none of them.

    Raises:
        TypeError, ValueError: a value that a step cannot take; the message names the step.
    """
    made = run_steps(artifact, columns, folds, len(artifact.steps))
    return {name: made[step][output] for name, (step, output) in zip(artifact.outputs, artifact.places, strict=True)}


def run_steps(
    artifact: Artifact, columns: Mapping[str, Column], folds: Sequence[int] | None, count: int
) -> list[list[Floats]]:
    """Outputs of the first `count` steps."""
    made: list[list[Floats]] = []
    for number, placed in enumerate(artifact.steps[:count]):
        inputs = [columns[s] if isinstance(s, str) else made[s[0]][s[1]] for s in placed.sources]
        try:
            made.append(placed.step.apply(inputs, folds))
        except (TypeError, ValueError) as error:
            error.add_note(f"steps[{number}] ({placed.step.kind})")
            raise
    return made


def folds_of(join_values: Sequence[object]) -> Ints:
    """Fold number of each row before it is taken modulo a step's folds: a hash of the join value that never changes."""
    return np.array([mmh3.hash(str(value).encode(), 0, signed=False) for value in join_values], np.int64)


def fitted_folds(artifact: Artifact, join_values: Sequence[object], times_us: Sequence[int]) -> list[int]:
    """Per row of a training set its fold, -1 for rows outside the time range that `artifact` was fitted on."""
    origin = artifact.origin
    inside = [origin.first_us <= t <= origin.last_us for t in times_us]
    return [int(fold) if known else -1 for fold, known in zip(folds_of(join_values), inside, strict=True)]
