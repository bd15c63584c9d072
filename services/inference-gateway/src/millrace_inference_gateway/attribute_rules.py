"""What rules ask of a prediction's inputs and features, answered by Predict: Envoy's route table sees only headers.

Each test has a mark, made from what it says. The outcomes go with the model call in one header, and Envoy's predicate for the test
looks for its mark there. Marks, and not places, because routes change in Python and in Envoy one after the other: a test that the other
side does not have yet is an error, which does not match, and is never taken for another test.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1 import common_pb2
from millrace_kit.cel_nodes import AttributeNode, Node, attribute_nodes, evaluate_attribute

OUTCOMES_HEADER = "x-millrace-rule-outcomes"


@dataclass(frozen=True, slots=True)
class AttributeRules:
    """The tests of one model's rules."""

    tests: tuple[tuple[AttributeNode, str, str], ...] = ()
    """Each with what the header says when it holds, and when it does not."""
    inputs: frozenset[str] = frozenset()
    """Those that are read."""
    features: tuple[tuple[str, int], ...] = ()
    """Those that are read, with their places in the vector."""

    def outcomes(self, inputs: Mapping[str, common_pb2.Value], features: Sequence[float]) -> bytes:
        """The header's value for one prediction; empty when no test has an outcome. A NaN among `features` is an absent one."""
        if not self.tests:
            return b""
        given = {name: _plain(inputs[name]) for name in self.inputs if name in inputs}
        known = {name: value for name, place in self.features if not math.isnan(value := features[place])}
        found = []
        for node, holds, fails in self.tests:
            outcome = evaluate_attribute(node, given if node.source == "inputs" else known)
            if outcome is not None:
                found.append(holds if outcome else fails)
        return "".join(found).encode()

    def with_outcomes(
        self, headers: Mapping[bytes, bytes], inputs: Mapping[str, common_pb2.Value], features: Sequence[float]
    ) -> Mapping[bytes, bytes]:
        """The caller's headers and, where rules ask, the outcomes."""
        found = self.outcomes(inputs, features)
        return {**headers, OUTCOMES_HEADER.encode(): found} if found else headers


NO_ATTRIBUTES = AttributeRules()


def attribute_rules(rules: Iterable[Node], feature_names: Sequence[str]) -> AttributeRules:
    """What Predict has to answer for these rules; a feature that the model does not have is always absent."""
    nodes = {outcome_text(node, holds=True): node for rule in rules for node in attribute_nodes(rule)}
    places = {name: place for place, name in enumerate(feature_names)}
    features = {node.name for node in nodes.values() if node.source == "features" and node.name in places}
    return AttributeRules(
        tests=tuple((node, holds, outcome_text(node, holds=False)) for holds, node in nodes.items()),
        inputs=frozenset(node.name for node in nodes.values() if node.source == "inputs"),
        features=tuple((name, places[name]) for name in sorted(features)),
    )


def outcome_text(node: AttributeNode, *, holds: bool) -> str:
    """What the header contains when the test has that outcome."""
    mark = hashlib.sha256(repr(node).encode()).hexdigest()[:10]
    return f"{mark}={int(holds)};"


def _plain(value: common_pb2.Value) -> str | int | float | bool | Timestamp | None:
    kind = value.WhichOneof("kind")
    return getattr(value, kind) if kind is not None else None
