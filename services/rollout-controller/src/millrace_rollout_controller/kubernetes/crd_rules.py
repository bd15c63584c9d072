"""What pydantic cannot say to an API server: patterns and CEL rules of the CRD, by the field they stand at.

The same rules as `manifest_rules.check_spec`; a test holds both against one table of manifests. Not here,
because one object cannot say it or CEL cannot: routing rules compile, one deployment per model. The controller says those in the status.
"""

from typing import Any

from millrace_rollout_controller.kubernetes.cel import DURATION, Rule, demand
from millrace_rollout_controller.kubernetes.crd_gate_rules import GATES, goal_rules
from millrace_rollout_controller.kubernetes.crd_server_rules import SERVER

_NAME = "^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$"
_IDENTIFIER = r"(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)"
SEMVER = (
    r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    rf"(-{_IDENTIFIER}(\.{_IDENTIFIER})*)?(\+[0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*)?$"
)
_STRATEGY = "(has(self.strategy) ? self.strategy : 'Canary')"
_DECIMALS = {
    # A text of a number costs too much; a hundredth divided again is the nearest double, as the parser found it.
    "rule": "double(int(double(self) * 100.0 + 0.5)) / 100.0 == double(self)",
    "message": "has more than two decimals",
}
_PROMOTE = {
    "rule": "!has(self.onSuccess) || self.onSuccess != 'Promote' || has(self.duration)"
    " || (has(self.minRequests) && self.minRequests > 0)",
    "message": "Promote needs minRequests or duration",
    "fieldPath": ".onSuccess",
}
SCHEMA: dict[str, dict[str, Any]] = {
    "spec.model": {"pattern": _NAME, "maxLength": 63, "minLength": 1},
    "spec.version": {"pattern": SEMVER, "maxLength": 128, "minLength": 5},
}
"""Added to a field's schema."""


def _only(block: str, strategy: str) -> Rule:
    return demand(f"!has(self.{block}) || {_STRATEGY} == '{strategy}'", f"belongs to {strategy}", f".{block}")


def _placement(spec: str) -> str:
    return f"(has({spec}.server) && has({spec}.server.placement) ? {spec}.server.placement : 'Separate')"


def _pool_of(spec: str) -> str:
    return f"(has({spec}.server) && has({spec}.server.pool) ? {spec}.server.pool.name : '')"


_SPEC: dict[str, list[Rule]] = {
    "spec.model": [demand("self == oldSelf", "cannot change; delete the deployment first")],
    "spec": [
        demand(
            f"{_placement('self')} == {_placement('oldSelf')}",
            "cannot change; delete the deployment first",
            ".server.placement",
        ),
        demand(
            f"{_pool_of('self')} == {_pool_of('oldSelf')}",
            "cannot change; delete the deployment first",
            ".server.pool",
        ),
        demand(
            "!has(self.rollout) || !has(self.rollout.strategy) || self.rollout.strategy != 'ABTest'"
            " || (has(self.routing) && has(self.routing.sticky))",
            "is needed by ABTest: a caller must stay on one version",
            ".routing.sticky",
        ),
        demand(
            "!has(self.balancing) || self.balancing != 'ConsistentHash' || (has(self.routing) && has(self.routing.sticky))",
            "is needed by ConsistentHash: its header's value chooses the server",
            ".routing.sticky",
        ),
        demand(
            "!has(self.rollout) || !has(self.rollout.strategy) || self.rollout.strategy != 'Shadow'"
            " || !has(self.routing) || !has(self.routing.rules) || self.routing.rules.all(r, r.to != 'candidate')",
            "cannot send to candidate: a shadow answers nobody",
            ".routing.rules",
        ),
        demand(
            "!has(self.rollout) || !has(self.rollout.countedBy) || self.rollout.countedBy != 'Servers' || !has(self.routing)"
            " || (!(has(self.routing.rules) && size(self.routing.rules) > 0) && !has(self.routing.callers)"
            " && !has(self.routing.testers) && !has(self.routing.hedgeAfterMs))",
            "cannot be Servers with rules, callers, testers or hedgeAfterMs: servers know nothing of them",
            ".rollout.countedBy",
        ),
        demand(
            "!has(self.rollout) || !has(self.rollout.countedBy) || self.rollout.countedBy != 'Servers'"
            f" || ({_placement('self')} == 'Separate' && {_pool_of('self')} == '')",
            "cannot be Servers with server.placement Shared or server.pool: nobody reaches such servers but by the gateways",
            ".rollout.countedBy",
        ),
    ],
    "spec.rollout": [
        demand(
            f"!has(self.advance) || self.advance == 'BySteps' || {_STRATEGY} == 'Canary'",
            "OnEvidence belongs to Canary",
            ".advance",
        ),
        demand(
            "!has(self.guard) || !has(self.guard.holdBackPercent) || double(self.guard.holdBackPercent) == 0.0"
            f" || {_STRATEGY} in ['Canary', 'ABTest']",
            "belongs to Canary and ABTest",
            ".guard.holdBackPercent",
        ),
        demand(
            "!has(self.guard) || !has(self.guard.holdBackPercent) || !has(self.steps) || self.steps.all(s,"
            " double(s.weight) == 100.0 || double(s.weight) <= 100.0 - double(self.guard.holdBackPercent))",
            "leaves less than a step's weight",
            ".guard.holdBackPercent",
        ),
        _only("steps", "Canary"),
        _only("blueGreen", "BlueGreen"),
        _only("abTest", "ABTest"),
        demand(f"!has(self.shadow) || {_STRATEGY} in ['Shadow', 'Canary']", "belongs to Shadow and Canary", ".shadow"),
        demand(
            f"!has(self.shadow) || !has(self.shadow.onSuccess) || self.shadow.onSuccess != 'Promote' || {_STRATEGY} != 'Canary'",
            "belongs to Shadow; a Canary goes on to its steps",
            ".shadow.onSuccess",
        ),
        demand(
            "!has(self.gates) || self.gates.all(g, !has(g.metric) || !g.metric.startsWith('shadow/'))"
            f" || has(self.shadow) || {_STRATEGY} == 'Shadow'"
            " || (has(self.blueGreen) && has(self.blueGreen.mirrorPercent) && self.blueGreen.mirrorPercent > 0.0)",
            "shadow/ needs copies: rollout.shadow, or rollout.blueGreen.mirrorPercent",
            ".gates",
        ),
    ],
    "spec.rollout.steps": [
        demand(
            "self.map(s, double(s.weight)).isSorted()"
            " && self.all(s, self.exists_one(other, double(other.weight) == double(s.weight)))",
            "each weight must be greater than the step's before",
        ),
    ],
    "spec.rollout.steps.items": [
        demand("!has(self.until) || has(self.maxRequests)", "is needed by until: Decided", ".maxRequests"),
        demand("!has(self.maxRequests) || has(self.until)", "belongs to until: Decided", ".maxRequests"),
        demand("!has(self.onUndecided) || has(self.until)", "belongs to until: Decided", ".onUndecided"),
        demand(
            "!has(self.maxRequests) || !has(self.minRequests) || self.maxRequests >= self.minRequests",
            "must be at least minRequests",
            ".maxRequests",
        ),
    ],
    "spec.rollout.guard.window": [DURATION],
    "spec.rollout.guard.holdBackPercent": [_DECIMALS],
    "spec.rollout.steps.items.weight": [_DECIMALS],
    "spec.rollout.steps.items.pause.duration": [DURATION],
    "spec.rollout.blueGreen.mirrorPercent": [_DECIMALS],
    "spec.rollout.blueGreen.pause.duration": [DURATION],
    "spec.rollout.abTest.bandit.minWeight": [_DECIMALS],
    "spec.rollout.abTest.bandit.maxChange": [_DECIMALS],
    "spec.rollout.abTest.bandit.interval": [DURATION],
    "spec.rollout.abTest": [
        demand(
            "!has(self.bandit) || (has(self.allocation) && self.allocation == 'Thompson')",
            "belongs to allocation Thompson",
            ".bandit",
        ),
        demand(
            "!has(self.allocation) || self.allocation != 'Thompson' || !has(self.goal) || self.goal != 'latencyP99Ms'",
            "cannot be a percentile with allocation Thompson",
            ".goal",
        ),
        *goal_rules(),
        demand(
            "!has(self.bandit) || ((has(self.bandit.minWeight) ? double(self.bandit.minWeight) : 10.0)"
            " <= (has(self.split) ? double(self.split) : 50.0) && (has(self.split) ? double(self.split) : 50.0)"
            " <= 100.0 - (has(self.bandit.minWeight) ? double(self.bandit.minWeight) : 10.0))",
            "leaves no room for the split it starts at",
            ".bandit.minWeight",
        ),
        _PROMOTE,
    ],
    "spec.rollout.abTest.split": [_DECIMALS],
    "spec.rollout.abTest.duration": [DURATION],
    "spec.rollout.shadow": [
        _PROMOTE
        | {
            "rule": f"{_PROMOTE['rule']} || (has(self.minPairs) && self.minPairs > 0)",
            "message": "Promote needs minRequests, minPairs or duration",
        }
    ],
    "spec.rollout.shadow.mirrorPercent": [_DECIMALS],
    "spec.rollout.shadow.duration": [DURATION],
}
CEL: dict[str, list[Rule]] = {**_SPEC, **GATES, **SERVER}
"""Rules by the path of the schema they stand at."""
