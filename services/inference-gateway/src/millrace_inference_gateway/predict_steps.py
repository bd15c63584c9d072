"""What is declared with a version for Predict: defaults of features, steps on the outputs, how long an answer may be given again.

The steps are a closed set; nothing a version declares is code.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from millrace_api.rollout.v1 import rollout_pb2
from millrace_kit.predict_plan import check_plan

Values = npt.NDArray[np.float64]
Step = Callable[[Values], Values]


@dataclass(frozen=True)
class CacheRule:
    """Which answers may be given again."""

    max_age_ms: int
    inputs: frozenset[str]
    """Empty takes all."""


@dataclass(frozen=True, eq=False)
class Plan:
    """One version's plan; two are the same when they are the same object."""

    defaults: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    labels: tuple[str, ...] = ()
    cache: CacheRule | None = None

    def filled(self, names: Sequence[str], values: tuple[float, ...]) -> tuple[tuple[float, ...], list[str]]:
        """`values` (of features `names`) with defaults where they are NaN, and the features that got one."""
        if not self.defaults:
            return values, []
        used = [name for name, value in zip(names, values, strict=True) if math.isnan(value) and name in self.defaults]
        if not used:
            return values, []
        filled = tuple(
            self.defaults.get(name, value) if math.isnan(value) else value
            for name, value in zip(names, values, strict=True)
        )
        return filled, used

    def finished(self, outputs: Sequence[float]) -> tuple[list[float], list[str]]:
        """What the caller gets for a row's outputs: values, and their names where the plan has some."""
        if not self.steps:
            return list(outputs), []
        values = np.asarray(outputs, np.float64)
        for step in self.steps:
            values = step(values)
        found: list[float] = values.tolist()
        return found, [self._label(value) for value in found] if self.labels else []

    def _label(self, value: float) -> str:
        return self.labels[int(value)] if 0 <= value < len(self.labels) else ""


NO_PLAN = Plan()


def checked_plan(message: rollout_pb2.PredictPlan, where: str) -> Plan:
    """The plan as values.

    Raises:
        InvalidArgumentError: names the field that is wrong.
    """
    check_plan(message, where)
    labels = next((tuple(step.labels.names) for step in message.post if step.HasField("labels")), ())
    steps = tuple(_step(step) for step in message.post if not step.HasField("labels"))
    cache = CacheRule(message.cache.max_age_ms, frozenset(message.cache.inputs)) if message.HasField("cache") else None
    return Plan(dict(message.defaults), steps, labels, cache)


def _step(step: rollout_pb2.PostStep) -> Step:
    match step.WhichOneof("step"):
        case "sigmoid":
            return _sigmoid
        case "softmax":
            return _softmax
        case "argmax":
            return _argmax
        case "threshold":
            bound = step.threshold.value
            return lambda values: (values >= bound).astype(np.float64)
        case _:
            low, high = step.clip.min, step.clip.max
            return lambda values: np.clip(values, low, high)


def _sigmoid(values: Values) -> Values:
    # Both halves without an exponent that overflows.
    small = np.exp(-np.abs(values))
    found: Values = np.where(values >= 0, 1 / (1 + small), small / (1 + small))
    return found


def _softmax(values: Values) -> Values:
    if not values.size:
        return values
    shifted = np.exp(values - values.max())
    found: Values = shifted / shifted.sum()
    return found


def _argmax(values: Values) -> Values:
    return np.asarray([values.argmax()], np.float64) if values.size else values
