"""Predict's answers that may be given again, for as long as the version declares.

Only while one version has all of a model's traffic: with two, each request is evidence for or against one of them, and none is spared.
Keys hold the version, its digest, its arm and the feature definitions, so that an answer never outlives what made it.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from millrace_api.common.v1 import common_pb2
from millrace_api.events.v1 import events_pb2
from millrace_api.prediction.v1 import prediction_pb2
from prometheus_client import Counter

from millrace_inference_gateway.predict_steps import CacheRule
from millrace_inference_gateway.routes import Arm, Route

LOOKUPS = Counter(
    "millrace_gateway_result_cache_total",
    "Predictions asked of the result cache, by outcome.",
    ["model", "version", "outcome"],
)

Key = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """One answer: what was logged of it, and what the caller got."""

    prediction: events_pb2.Prediction
    response: prediction_pb2.PredictResponse
    at_s: float


class ResultCache:
    """At most `max_entries` answers; the one not used for longest goes first."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[Key, Kept] = OrderedDict()
        self._definitions: dict[str, str] = {}

    def key(self, route: Route, request: prediction_pb2.PredictRequest) -> Key | None:
        """What makes this request the same as another; None where answers are not kept."""
        arm = only_arm(route)
        rule = route.plan.cache
        if arm is None or rule is None:
            return None
        return (
            route.model,
            arm.version,
            arm.digest,
            arm.candidate,
            route.plan.definitions or self._definitions.get(route.feature_service, ""),
            request.event_time.SerializeToString() if request.HasField("event_time") else b"",
            _inputs(request.inputs, rule),
        )

    def find(self, key: Key, rule: CacheRule, now_s: float) -> Kept | None:
        """The answer of `key` that is young enough."""
        kept = self._entries.get(key)
        fresh = kept is not None and now_s - kept.at_s <= rule.max_age_ms / 1000
        LOOKUPS.labels(key[0], key[1], "hit" if fresh else "miss").inc()
        if kept is None or not fresh:
            self._entries.pop(key, None)
            return None
        self._entries.move_to_end(key)
        return kept

    def keep(self, key: Key, kept: Kept) -> None:
        """Remember an answer, unless another version than the one of the key gave it."""
        if (kept.prediction.version, kept.prediction.digest) != (key[1], key[2]):
            return
        self._entries[key] = kept
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def saw_definitions(self, feature_service: str, definitions_hash: str) -> None:
        """Features now come from these definitions; answers made from others are no longer found."""
        self._definitions[feature_service] = definitions_hash

    def __len__(self) -> int:
        return len(self._entries)


def only_arm(route: Route) -> Arm | None:
    """The version that answers every request of a model; None where there may be two, or one that gets copies."""
    weighted = [arm for arm in route.arms if arm.weight]
    alone = len(weighted) == 1 and not route.rules and not any(arm.mirror for arm in route.arms)
    return weighted[0] if alone else None


def _inputs(inputs: Mapping[str, common_pb2.Value], rule: CacheRule) -> tuple[tuple[str, bytes], ...]:
    names = sorted(rule.inputs & set(inputs)) if rule.inputs else sorted(inputs)
    return tuple((name, inputs[name].SerializeToString()) for name in names)
