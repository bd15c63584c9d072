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
MAX_MEMBERS = 8
MAX_PART_TIMEOUT_MS = 600_000


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
    _check_graph(plan, where)
    if plan.HasField("cache"):
        if not 1 <= plan.cache.max_age_ms <= MAX_CACHE_AGE_MS:
            raise InvalidArgumentError(f"{where}.cache.max_age_ms", f"must be 1 to {MAX_CACHE_AGE_MS}")
        if len(plan.cache.inputs) > MAX_CACHE_INPUTS:
            raise InvalidArgumentError(f"{where}.cache.inputs", f"has more than {MAX_CACHE_INPUTS} entries")


def _check_graph(plan: rollout_pb2.PredictPlan, where: str) -> None:
    """Other models that have a part in the answer."""
    kind = plan.WhichOneof("graph")
    if kind is None:
        return
    if plan.HasField("cache"):
        problem = (
            f"cannot stand beside {kind}: an answer would outlive the other models' versions; let those declare it"
        )
        raise InvalidArgumentError(f"{where}.cache", problem)
    if kind == "cascade":
        cascade, place = plan.cascade, f"{where}.cascade"
        _check_part(cascade.model, cascade.timeout_ms, place)
        match cascade.WhichOneof("when"):
            case None:
                raise InvalidArgumentError(place, "needs between, topBelow or marginBelow")
            case "between":
                check.finite(cascade.between.min, f"{place}.between.min")
                check.finite(cascade.between.max, f"{place}.between.max")
                if cascade.between.min > cascade.between.max:
                    raise InvalidArgumentError(f"{place}.between", "has a min above its max")
            case "top_below":
                check.finite(cascade.top_below, f"{place}.top_below")
            case _:
                check.finite(cascade.margin_below, f"{place}.margin_below")
        return
    ensemble, place = plan.ensemble, f"{where}.ensemble"
    if not 1 <= len(ensemble.members) <= MAX_MEMBERS:
        raise InvalidArgumentError(f"{place}.members", f"needs 1 to {MAX_MEMBERS} models")
    if ensemble.combination not in rollout_pb2.Combination.values():
        raise InvalidArgumentError(f"{place}.combination", "is no known combination")
    _check_weight(ensemble.own_weight, f"{place}.own_weight")
    seen: set[str] = set()
    for index, member in enumerate(ensemble.members):
        _check_part(member.model, member.timeout_ms, f"{place}.members[{index}]")
        _check_weight(member.weight, f"{place}.members[{index}].weight")
        if member.model in seen:
            raise InvalidArgumentError(f"{place}.members[{index}].model", f"{member.model!r} is there twice")
        if member.optional and ensemble.combination == rollout_pb2.COMBINATION_CONCATENATION:
            raise InvalidArgumentError(f"{place}.members[{index}].optional", "would change what the outputs mean")
        seen.add(member.model)


def _check_part(model: str, timeout_ms: int, where: str) -> None:
    check.name(model, f"{where}.model")
    if not 0 <= timeout_ms <= MAX_PART_TIMEOUT_MS:
        raise InvalidArgumentError(f"{where}.timeout_ms", f"must be 0 to {MAX_PART_TIMEOUT_MS}")


def _check_weight(weight: float, where: str) -> None:
    check.finite(weight, where)
    if weight < 0:
        raise InvalidArgumentError(where, "must not be negative")


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
