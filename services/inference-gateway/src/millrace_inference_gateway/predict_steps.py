"""What is declared with a version for Predict: defaults of features, steps on the outputs, how long an answer may be given again.

The steps are a closed set; nothing a version declares is code.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from millrace_api.rollout.v1 import rollout_pb2
from millrace_kit.predict_plan import CHOICES, check_plan

from millrace_inference_gateway.graphs import Graph, graph_of

_BY_PLACE = CHOICES - {"argmax", "threshold"}

Values = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


class Outputs(NamedTuple):
    """A row's outputs between two steps, and where each stands among the model's own."""

    values: Values
    places: Places


class Finished(NamedTuple):
    """What the caller gets for a row's outputs."""

    values: list[float]
    labels: list[str]
    """Their names, where the plan has some."""
    places: list[int]
    """Where they stand among the model's own, where the plan chose some."""


Step = Callable[[Outputs], Outputs]


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
    by_place: bool = False
    """Whether labels name places, not values."""
    chosen: bool = False
    """Whether steps choose among the outputs."""
    hidden: bool = False
    """Whether callers do not get the model's own outputs."""
    cache: CacheRule | None = None
    definitions: str = ""
    """Hash of the definitions that features are read with; empty takes those in force."""
    graph: Graph | None = None
    """Other models that have a part in the answer."""

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

    def finished(self, outputs: Sequence[float]) -> Finished:
        """What the caller gets for a row's outputs."""
        if not self.steps:
            return Finished(list(outputs), [], [])
        found = Outputs(np.asarray(outputs, np.float64), np.arange(len(outputs)))
        for step in self.steps:
            found = step(found)
        values: list[float] = found.values.tolist()
        places: list[int] = found.places.tolist()
        labels = [self._label(value) for value in (places if self.by_place else values)] if self.labels else []
        return Finished(values, labels, places if self.chosen else [])

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
    kinds = [kind for step in message.post if (kind := step.WhichOneof("step")) is not None]
    choice = next((kind for kind in reversed(kinds) if kind in CHOICES), "")
    return Plan(
        dict(message.defaults),
        tuple(_step(step) for step in message.post if not step.HasField("labels")),
        labels,
        by_place=choice in _BY_PLACE,
        chosen=bool(_BY_PLACE.intersection(kinds)) and "argmax" not in kinds,
        hidden=message.hide_model_outputs,
        cache=CacheRule(message.cache.max_age_ms, frozenset(message.cache.inputs))
        if message.HasField("cache")
        else None,
        definitions=message.definitions_hash,
        graph=graph_of(message),
    )


def _step(step: rollout_pb2.PostStep) -> Step:
    match step.WhichOneof("step"):
        case "argmax":
            return _argmax
        case "keep":
            kept = np.array(step.keep.places, np.int64)
            return lambda found: _at(found, _where(found, kept))
        case "drop":
            dropped = np.array(step.drop.places, np.int64)
            return lambda found: _at(found, np.flatnonzero(~np.isin(found.places, dropped)))
        case "top":
            count = step.top.count
            return lambda found: _at(found, np.argsort(-found.values, kind="stable")[:count])
        case "at_least":
            least = step.at_least.value
            return lambda found: _at(found, np.flatnonzero(found.values >= least))
        case _:
            change = _change(step)
            return lambda found: Outputs(change(found.values), found.places)


def _change(step: rollout_pb2.PostStep) -> Callable[[Values], Values]:
    """Of each value, or of all together; none goes and none moves."""
    match step.WhichOneof("step"):
        case "sigmoid":
            return _sigmoid
        case "softmax":
            return _softmax
        case "threshold":
            bound = step.threshold.value
            return lambda values: (values >= bound).astype(np.float64)
        case "round":
            decimals = step.round.decimals
            return lambda values: np.round(values, decimals)
        case _:
            low, high = step.clip.min, step.clip.max
            return lambda values: np.clip(values, low, high)


def _at(found: Outputs, chosen: "npt.NDArray[np.intp]") -> Outputs:
    return Outputs(found.values[chosen], found.places[chosen])


def _where(found: Outputs, places: Places) -> "npt.NDArray[np.intp]":
    """Indices of those of `places` that are there, in their order."""
    known = {place: index for index, place in enumerate(found.places.tolist())}
    return np.array([known[place] for place in places.tolist() if place in known], np.intp)


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


def _argmax(found: Outputs) -> Outputs:
    if not found.values.size:
        return found
    best = found.places[[found.values.argmax()]]
    return Outputs(best.astype(np.float64), best)
