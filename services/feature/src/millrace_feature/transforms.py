"""On-demand features: the user's own functions on columns, the same call for one request row and for a training set.

A function gets lists by name and gives lists by name. A stored feature is named `feature` and `view__feature`; where a request field has
the short name too, the request field keeps it. A missing value is None.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from millrace_kit.errors import FailedPreconditionError

from millrace_feature.plan import Transform

Columns = Mapping[str, Sequence[object]]
NAN = float("nan")


class TransformRunner:
    """One transform, its function loaded."""

    def __init__(self, transform: Transform) -> None:
        import dill

        self.plan = transform
        self._function: Callable[[Any], Any] = dill.loads(transform.body)  # noqa: S301 - see compiler.py

    def run(self, stored: Mapping[tuple[str, str], list[Any]], request: Columns, rows: int) -> list[list[float]]:
        """Output columns in order, NaN where missing.

        Args:
            stored: values by (view alias, feature), one a row.
            request: request fields by name, one value a row.
            rows: number of rows.

        Raises:
            FailedPreconditionError: the function failed, or its result has not the declared form.
        """
        inputs: dict[str, list[Any]] = {name: list(request[name]) for name in self.plan.request_fields}
        for alias, feature in self.plan.inputs:
            values = stored[alias, feature]
            inputs[f"{alias}__{feature}"] = values
            inputs.setdefault(feature, values)
        try:
            outputs = self._by_row(inputs, rows) if self.plan.singleton else self._function(inputs)
            return [_floats(outputs[name], rows) for name in self.plan.outputs]
        except Exception as error:
            message = f"on-demand view {self.plan.name!r} failed: {type(error).__name__}: {error}"
            raise FailedPreconditionError("TRANSFORM_FAILED", message, {"view": self.plan.name}) from error

    def _by_row(self, inputs: Mapping[str, list[Any]], rows: int) -> dict[str, list[Any]]:
        results = [self._function({name: values[i] for name, values in inputs.items()}) for i in range(rows)]
        return {name: [result[name] for result in results] for name in self.plan.outputs}


def _floats(values: Sequence[Any], rows: int) -> list[float]:
    if len(values) != rows:
        raise ValueError(f"{len(values)} values for {rows} rows")
    return [NAN if value is None else float(value) for value in values]


def or_none(value: float) -> float | None:
    """NaN as None, which is what functions are given."""
    return None if math.isnan(value) else value
