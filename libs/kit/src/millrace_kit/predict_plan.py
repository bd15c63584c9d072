"""What a model version declares for Predict, and what is right in it: the registry's tag `millrace.predict`, as JSON.

The controller refuses a version whose plan is wrong before it gets a route; the gateway checks again what it is told.
"""

from collections.abc import Sequence

from google.protobuf import json_format
from millrace_api.rollout.v1 import rollout_pb2

from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

TAG = "millrace.predict"
MAX_STEPS = 8
CHOICES = frozenset({"argmax", "threshold", "keep", "drop", "top", "at_least"})
"""Steps whose result `labels` may name."""
MAX_PLACES = 1000
MAX_PLACE = 1_000_000
MAX_DECIMALS = 15
MAX_LABELS = 1000
MAX_LABEL = 256
MAX_DEFAULTS = 10_000
MAX_CACHE_AGE_MS = 86_400_000
MAX_CACHE_INPUTS = 256


def read_plan(text: str, where: str) -> rollout_pb2.PredictPlan:
    """The plan that `text` holds (the JSON form of `PredictPlan`); an empty text is an empty plan.

    Raises:
        InvalidArgumentError: it is no such JSON, or says something that cannot be; names the field below `where`.
    """
    plan = rollout_pb2.PredictPlan()
    if not text:
        return plan
    try:
        json_format.Parse(text, plan)
    except json_format.ParseError as error:
        raise InvalidArgumentError(where, str(error)) from None
    check_plan(plan, where)
    return plan


def check_plan(plan: rollout_pb2.PredictPlan, where: str) -> None:
    """Check a plan.

    Raises:
        InvalidArgumentError: names the field below `where` that is wrong.
    """
    if len(plan.defaults) > MAX_DEFAULTS:
        raise InvalidArgumentError(f"{where}.defaults", f"has more than {MAX_DEFAULTS} entries")
    for name, value in plan.defaults.items():
        check.finite(value, f"{where}.defaults[{name!r}]")
    if len(plan.post) > MAX_STEPS:
        raise InvalidArgumentError(f"{where}.post", f"has more than {MAX_STEPS} steps")
    before = ""
    # Steps that change no order and no meaning stand between a choice and its names.
    passing = {"round", "clip"}
    for index, step in enumerate(plan.post):
        place = f"{where}.post[{index}]"
        if before == "labels":
            raise InvalidArgumentError(place, "comes after labels, which must be the last step")
        _check_step(step, before, place)
        kind = step.WhichOneof("step") or ""
        before = before if kind in passing and before else kind
    if plan.definitions_hash:
        check.sha256(plan.definitions_hash, f"{where}.definitions_hash")
    if plan.HasField("cache"):
        if not 1 <= plan.cache.max_age_ms <= MAX_CACHE_AGE_MS:
            raise InvalidArgumentError(f"{where}.cache.max_age_ms", f"must be 1 to {MAX_CACHE_AGE_MS}")
        if len(plan.cache.inputs) > MAX_CACHE_INPUTS:
            raise InvalidArgumentError(f"{where}.cache.inputs", f"has more than {MAX_CACHE_INPUTS} entries")


def _check_step(step: rollout_pb2.PostStep, before: str, where: str) -> None:
    match step.WhichOneof("step"):
        case None:
            raise InvalidArgumentError(where, "is no known step")
        case "threshold":
            check.finite(step.threshold.value, f"{where}.threshold.value")
        case "clip":
            check.finite(step.clip.min, f"{where}.clip.min")
            check.finite(step.clip.max, f"{where}.clip.max")
            if step.clip.min > step.clip.max:
                raise InvalidArgumentError(f"{where}.clip", "has a min above its max")
        case "at_least":
            check.finite(step.at_least.value, f"{where}.at_least.value")
        case "keep":
            _check_places(step.keep.places, f"{where}.keep.places")
        case "drop":
            _check_places(step.drop.places, f"{where}.drop.places")
        case "round":
            if not 0 <= step.round.decimals <= MAX_DECIMALS:
                raise InvalidArgumentError(f"{where}.round.decimals", f"must be 0 to {MAX_DECIMALS}")
        case "top":
            if not 1 <= step.top.count <= MAX_PLACES:
                raise InvalidArgumentError(f"{where}.top.count", f"must be 1 to {MAX_PLACES}")
        case "labels":
            if before not in CHOICES:
                raise InvalidArgumentError(where, f"needs one of {', '.join(sorted(CHOICES))} before it")
            names = step.labels.names
            if not 1 <= len(names) <= MAX_LABELS or any(not 0 < len(name) <= MAX_LABEL for name in names):
                problem = f"needs 1 to {MAX_LABELS} names of 1 to {MAX_LABEL} characters"
                raise InvalidArgumentError(f"{where}.labels.names", problem)
        case _:
            return


def _check_places(places: Sequence[int], where: str) -> None:
    if not 1 <= len(places) <= MAX_PLACES:
        raise InvalidArgumentError(where, f"needs 1 to {MAX_PLACES} places")
    if len(set(places)) < len(places) or any(not 0 <= place <= MAX_PLACE for place in places):
        raise InvalidArgumentError(where, f"needs places of 0 to {MAX_PLACE}, each once")
