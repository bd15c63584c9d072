"""Computed features: the user's own functions on columns and fitted transformers, the same call for one request row and for a training set.

A function gets lists by name and gives lists by name. A stored feature is named `view__feature`, and `feature` too where no request field
and no other view has that name. A missing value is None. A function runs in the service's own threads: what it raises is
the caller's error and names the view, but one that never returns cannot be stopped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millrace_kit.errors import FailedPreconditionError

from millrace_feature.plan import Transform
from millrace_feature.transformers.applying import fitted_folds, transformed
from millrace_feature.transformers.artifact import from_content

Columns = Mapping[str, Sequence[object]]
Stored = Mapping[tuple[str, str], Sequence[Any]]
"""Values by (view alias, feature), one a row."""
NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Labelled:
    """What marks the rows of a training set: a fitted transformer must not give a row what it learned from the row's own label."""

    join_values: Sequence[object]
    times_us: Sequence[int]


class TransformRunner:
    """One transform, its function or its fitted steps loaded."""

    def __init__(self, transform: Transform) -> None:
        self.plan = transform
        self._run = _fitted(transform) if transform.fitted else _python(transform)

    def run(
        self, stored: Stored, request: Columns, rows: int, labelled: Labelled | None = None
    ) -> list[Sequence[float]]:
        """Output columns in order, NaN where missing.

        Args:
            stored: values by (view alias, feature), one a row; outputs of on-demand views by (view, output).
            request: request fields by name, one value a row.
            rows: number of rows.
            labelled: the rows, where they are those of a training set.

        Raises:
            FailedPreconditionError: the function failed, or its result has not the declared form.
        """
        try:
            return self._run(stored, request, rows, labelled)
        except (
            Exception,
            SystemExit,
        ) as error:  # whatever a user's function raises; `exit()` in it must not end the service
            kind = "transformer" if self.plan.fitted else "on-demand view"
            notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
            message = f"{kind} {self.plan.name!r} failed: {type(error).__name__}: {error}{notes}"
            raise FailedPreconditionError("TRANSFORM_FAILED", message, {"view": self.plan.name}) from error

    def placed(self, outputs: list[Sequence[float]]) -> dict[tuple[str, str], list[Any]]:
        """What `run` gave by (view, output), as later transforms take it."""
        return {(self.plan.name, name): list(column) for name, column in zip(self.plan.outputs, outputs, strict=True)}


Run = Callable[[Stored, Columns, int, Labelled | None], list[Sequence[float]]]


def _fitted(plan: Transform) -> Run:
    artifact = from_content(plan.body)
    names = list(zip(artifact.inputs, plan.inputs, strict=True))

    def run(stored: Stored, request: Columns, rows: int, labelled: Labelled | None) -> list[Sequence[float]]:
        del request, rows
        folds = None if labelled is None else fitted_folds(artifact, labelled.join_values, labelled.times_us)
        found = transformed(artifact, {name: stored[place] for name, place in names}, folds)
        return [found[name].tolist() for name in plan.outputs]

    return run


def _python(plan: Transform) -> Run:
    import dill

    function: Callable[[Any], Any] = dill.loads(plan.body)  # noqa: S301 - see compiler.py
    known = [*plan.request_fields, *(feature for _alias, feature in plan.inputs)]
    short = {name for name in known if known.count(name) == 1} - set(plan.request_fields)

    def run(stored: Stored, request: Columns, rows: int, labelled: Labelled | None) -> list[Sequence[float]]:
        del labelled
        inputs: dict[str, list[Any]] = {name: list(request[name]) for name in plan.request_fields}
        for alias, feature in plan.inputs:
            values = list(stored[alias, feature])
            inputs[f"{alias}__{feature}"] = values
            if feature in short:
                inputs[feature] = values
        outputs = _by_row(function, plan.outputs, inputs, rows) if plan.singleton else function(inputs)
        return [_floats(outputs[name], rows) for name in plan.outputs]

    return run


def _by_row(
    function: Callable[[Any], Any], outputs: Sequence[str], inputs: Mapping[str, list[Any]], rows: int
) -> dict[str, list[Any]]:
    results = [function({name: values[i] for name, values in inputs.items()}) for i in range(rows)]
    return {name: [result[name] for result in results] for name in outputs}


def _floats(values: Sequence[Any], rows: int) -> list[float]:
    if len(values) != rows:
        raise ValueError(f"{len(values)} values for {rows} rows")
    return [NAN if value is None else float(value) for value in values]


def or_none(value: float) -> float | None:
    """NaN as None, which is what functions are given."""
    return None if math.isnan(value) else value
