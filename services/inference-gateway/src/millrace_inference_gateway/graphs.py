"""Ensembles and cascades: other models that have a part in an answer, as the version that answers declares it.

Each part is a prediction of its own: for the same entity, with the features of its own model, by that model's arms and rules, with the same key, so that a caller keeps
its arm in every model; it is in the log with the id of the prediction it is a part of. A graph is part of a version, so a rollout judges a new one like a new model.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from millrace_api.prediction.v1 import prediction_pb2
from millrace_api.rollout.v1 import rollout_pb2
from millrace_kit.errors import FailedPreconditionError, MillraceError

MAX_DEPTH = 4
"""Models one after the other, each asked by the one before."""

Values = npt.NDArray[np.float64]
Combine = Callable[[Values, Values], Values]
"""Outputs [models, outputs] and weights [models] to outputs."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """Another model, and how much it is needed."""

    model: str
    optional: bool = False
    timeout_ms: int = 0
    weight: float = 1.0


Ask = Callable[[Part], Awaitable[prediction_pb2.PredictResponse]]


@dataclass(slots=True)
class Joined:
    """What came of a graph for one row."""

    outputs: Sequence[float]
    """What the version's steps go on with; without meaning when another model's answer is the answer."""
    instead: prediction_pb2.PredictResponse | None = None
    """The other model's answer that is given in the place of the version's own."""
    parts: list[prediction_pb2.PredictResponse] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Outputs of all models become one."""

    members: tuple[Part, ...]
    combine: Combine
    own_weight: float

    async def joined(self, outputs: Sequence[float], ask: Ask) -> Joined:
        """Ask all members at once.

        Raises:
            MillraceError: a needed member failed, or its outputs do not fit.
        """
        answers = await _together([_asked(part, ask) for part in self.members])
        found = Joined(outputs)
        rows, weights = [np.asarray(outputs, np.float64)], [self.own_weight]
        for part, answer in zip(self.members, answers, strict=True):
            if answer is None:
                found.left_out.append(part.model)
                continue
            found.parts.append(answer)
            rows.append(np.asarray(answer.outputs, np.float64))
            weights.append(part.weight)
            if self.combine is not _concatenated and rows[-1].shape != rows[0].shape:
                text = f"{part.model!r} gives {rows[-1].size} outputs, {rows[0].size} are needed"
                metadata = {"model": part.model, "outputs": str(rows[-1].size), "needed": str(rows[0].size)}
                raise FailedPreconditionError("GRAPH_OUTPUTS_DIFFER", text, metadata)
        if self.combine is _concatenated:
            found.outputs = np.concatenate(rows).tolist()
        else:
            found.outputs = self.combine(np.stack(rows), np.asarray(weights)).tolist()
        return found


@dataclass(frozen=True, slots=True)
class Cascade:
    """Another model answers what this one is not sure of."""

    part: Part
    unsure: Callable[[Sequence[float]], bool]

    async def joined(self, outputs: Sequence[float], ask: Ask) -> Joined:
        """Ask the other model if need be.

        Raises:
            MillraceError: it was needed and failed.
        """
        found = Joined(outputs)
        if self.unsure(outputs):
            found.instead = await _asked(self.part, ask)
            if found.instead is None:
                found.left_out.append(self.part.model)
            else:
                found.parts.append(found.instead)
        return found


Graph = Ensemble | Cascade


def graph_of(plan: rollout_pb2.PredictPlan) -> Graph | None:
    """The graph of a plan that was checked."""
    match plan.WhichOneof("graph"):
        case "ensemble":
            members = tuple(
                Part(each.model, each.optional, each.timeout_ms, each.weight or 1.0) for each in plan.ensemble.members
            )
            return Ensemble(members, _COMBINE[plan.ensemble.combination], plan.ensemble.own_weight or 1.0)
        case "cascade":
            cascade = plan.cascade
            return Cascade(Part(cascade.model, cascade.optional, cascade.timeout_ms), _unsure(cascade))
        case _:
            return None


def check_trail(trail: Sequence[str], model: str) -> None:
    """Whether `model` may be asked by the last of `trail`.

    Raises:
        FailedPreconditionError: it asks itself, over however many others, or the way there is too long.
    """
    way = " → ".join([*trail, model])
    if model in trail:
        raise FailedPreconditionError("GRAPH_CYCLE", f"models ask each other in a circle: {way}", {"way": way})
    if len(trail) >= MAX_DEPTH:
        text = f"more than {MAX_DEPTH} models ask each other one after the other: {way}"
        raise FailedPreconditionError("GRAPH_TOO_DEEP", text, {"way": way, "limit": str(MAX_DEPTH)})


async def _asked(part: Part, ask: Ask) -> prediction_pb2.PredictResponse | None:
    """The part's answer; None when it failed and is not needed."""
    try:
        return await ask(part)
    except MillraceError as error:
        if part.optional and error.code is not grpc.StatusCode.PERMISSION_DENIED:
            return None
        code = grpc.StatusCode.FAILED_PRECONDITION if error.code is grpc.StatusCode.NOT_FOUND else error.code
        metadata = {**error.metadata, "part": part.model}
        raise MillraceError(
            code, error.reason, f"{part.model!r}, asked for its part: {error.message}", metadata
        ) from error


async def _together(calls: Sequence[Awaitable[T]]) -> list[T]:
    """All results; with the first failure the others end too."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _mean(rows: Values, weights: Values) -> Values:
    found: Values = np.average(rows, axis=0, weights=weights)
    return found


def _median(rows: Values, _weights: Values) -> Values:
    found: Values = np.median(rows, axis=0)
    return found


def _largest(rows: Values, _weights: Values) -> Values:
    found: Values = rows.max(axis=0)
    return found


def _smallest(rows: Values, _weights: Values) -> Values:
    found: Values = rows.min(axis=0)
    return found


def _concatenated(rows: Values, _weights: Values) -> Values:
    return rows.reshape(-1)


_COMBINE: dict[int, Combine] = {
    rollout_pb2.COMBINATION_UNSPECIFIED: _mean,
    rollout_pb2.COMBINATION_MEAN: _mean,
    rollout_pb2.COMBINATION_MEDIAN: _median,
    rollout_pb2.COMBINATION_MAX: _largest,
    rollout_pb2.COMBINATION_MIN: _smallest,
    rollout_pb2.COMBINATION_CONCATENATION: _concatenated,
}


def _unsure(cascade: rollout_pb2.Cascade) -> Callable[[Sequence[float]], bool]:
    """NaN is never sure; one output has no next one, and no output says nothing."""
    match cascade.WhichOneof("when"):
        case "between":
            low, high = cascade.between.min, cascade.between.max
            return lambda outputs: len(outputs) != 1 or not (outputs[0] < low or outputs[0] > high)
        case "top_below":
            bound = cascade.top_below
            return lambda outputs: not any(output >= bound for output in outputs)
        case _:
            margin = cascade.margin_below

            def close(outputs: Sequence[float]) -> bool:
                if len(outputs) < 2:
                    return True
                second, first = sorted(outputs)[-2:]
                return not first - second >= margin or any(output != output for output in outputs)  # noqa: PLR0124 - NaN

            return close
