"""What pydantic cannot say to an API server: patterns and CEL rules of the CRD, by the field they stand at.

The same rules as `manifest_rules.check_spec` and `server_block.check_server`; a test holds both against one table of manifests. Not here,
because one object cannot say it or CEL cannot: routing rules compile, one deployment per model. The controller says those in the status.
"""

from typing import Any

Rule = dict[str, str]
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
_DURATION = {
    "rule": "duration(self) > duration('0s') && duration(self) <= duration('720h')",
    "message": "must be more than 0 and at most 720h",
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


_VALUE = "(self.metric.startsWith('business/') || self.metric in ['outcome/mae', 'outcome/rmse'])"
"""A gate's metric is about values of any unit."""


def _rule(rule: str, message: str, field: str = "") -> Rule:
    return {"rule": rule, "message": message} | ({"fieldPath": field} if field else {})


def _forms(metric: str, *allowed: str) -> list[Rule]:
    refused = [form for form in ("max", "min", "compare") if form not in allowed]
    return [
        _rule(
            f"!has(self.metric) || self.metric != '{metric}' || !has(self.{form})",
            f"does not fit {metric}; use {' or '.join(allowed)}",
            f".{form}",
        )
        for form in refused
    ]


def _bound(form: str) -> list[Rule]:
    rules = [
        _rule(
            f"!has(self.metric) || !{_VALUE} || !has(self.{form}) || (self.{form} >= -1e12 && self.{form} <= 1e12"
            f" && (self.{form} > 0.0 || self.metric.startsWith('business/')))",
            "must be at most 1e12 from 0, and of an error more than 0",
            f".{form}",
        ),
        _rule(
            f"!has(self.valueRange) || self.valueRange.size() != 2 || !has(self.{form})"
            f" || (self.{form} > self.valueRange[0] && self.{form} < self.valueRange[1])",
            "must lie inside valueRange",
            f".{form}",
        ),
        _rule(
            f"!has(self.metric) || self.metric.startsWith('latency') || self.metric == 'throughput'"
            f" || self.metric == 'shadow/maxAbsDiff' || {_VALUE} || !has(self.{form})"
            f" || (self.{form} > 0.0 && self.{form} < 1.0)",
            "must be between 0 and 1, both left out",
            f".{form}",
        ),
    ]
    if form == "max":
        rules.append(
            _rule(
                "!has(self.metric) || !self.metric.startsWith('latency') || !has(self.max)"
                " || (self.max > 0.0 && self.max <= 600000.0)",
                "must be more than 0 and at most 600000 (milliseconds)",
                ".max",
            )
        )
    else:
        rules.append(
            _rule(
                "!has(self.metric) || self.metric != 'throughput' || !has(self.min)"
                " || (self.min > 0.0 && self.min <= 1000000000.0)",
                "must be more than 0 and at most 1e9 (requests a second)",
                ".min",
            )
        )
    return rules


def _only(block: str, strategy: str) -> Rule:
    return _rule(f"!has(self.{block}) || {_STRATEGY} == '{strategy}'", f"belongs to {strategy}", f".{block}")


def _placement(spec: str) -> str:
    return f"(has({spec}.server) && has({spec}.server.placement) ? {spec}.server.placement : 'Separate')"


def _pool() -> list[Rule]:
    given = {
        "placement": "has(self.placement) && self.placement == 'Shared'", "replicas": "has(self.replicas) && self.replicas != 1",
        "resources": "has(self.resources) && (has(self.resources.limits) && size(self.resources.limits) > 0"
        " || has(self.resources.requests) && size(self.resources.requests) > 0)",
        "rateLimit": "has(self.rateLimit)", "responseCacheMib": "has(self.responseCacheMib) && self.responseCacheMib > 0",
    }  # fmt: skip
    message = "does not fit pool: the server is not this deployment's own"
    return [
        *(_rule(f"!has(self.pool) || !({rule})", message, f".{field}") for field, rule in given.items()),
        _rule(
            "!has(self.pool) || !has(self.pool.pinned) || !self.pool.pinned || !has(self.autoscaling)",
            "does not fit pool.pinned, which never sleeps",
            ".autoscaling",
        ),
        _rule(
            "!has(self.pool) || !has(self.pool.capacityMib) || !has(self.memoryMib) || self.memoryMib <= self.pool.capacityMib",
            "must be at most pool.capacityMib, or it is never loaded",
            ".memoryMib",
        ),
    ]


def _pool_of(spec: str) -> str:
    return f"(has({spec}.server) && has({spec}.server.pool) ? {spec}.server.pool.name : '')"


CEL: dict[str, list[Rule]] = {
    "spec.model": [_rule("self == oldSelf", "cannot change; delete the deployment first")],
    "spec": [
        _rule(
            f"{_placement('self')} == {_placement('oldSelf')}",
            "cannot change; delete the deployment first",
            ".server.placement",
        ),
        _rule(
            f"{_pool_of('self')} == {_pool_of('oldSelf')}",
            "cannot change; delete the deployment first",
            ".server.pool",
        ),
        _rule(
            "!has(self.rollout) || !has(self.rollout.strategy) || self.rollout.strategy != 'ABTest'"
            " || (has(self.routing) && has(self.routing.sticky))",
            "is needed by ABTest: a caller must stay on one version",
            ".routing.sticky",
        ),
        _rule(
            "!has(self.balancing) || self.balancing != 'ConsistentHash' || (has(self.routing) && has(self.routing.sticky))",
            "is needed by ConsistentHash: its header's value chooses the server",
            ".routing.sticky",
        ),
        _rule(
            "!has(self.rollout) || !has(self.rollout.strategy) || self.rollout.strategy != 'Shadow'"
            " || !has(self.routing) || !has(self.routing.rules) || self.routing.rules.all(r, r.to != 'candidate')",
            "cannot send to candidate: a shadow answers nobody",
            ".routing.rules",
        ),
        _rule(
            "!has(self.rollout) || !has(self.rollout.countedBy) || self.rollout.countedBy != 'Servers' || !has(self.routing)"
            " || (!(has(self.routing.rules) && size(self.routing.rules) > 0) && !has(self.routing.callers)"
            " && !has(self.routing.testers) && !has(self.routing.hedgeAfterMs))",
            "cannot be Servers with rules, callers, testers or hedgeAfterMs: servers know nothing of them",
            ".rollout.countedBy",
        ),
        _rule(
            "!has(self.rollout) || !has(self.rollout.countedBy) || self.rollout.countedBy != 'Servers'"
            f" || ({_placement('self')} == 'Separate' && {_pool_of('self')} == '')",
            "cannot be Servers with server.placement Shared or server.pool: nobody reaches such servers but by the gateways",
            ".rollout.countedBy",
        ),
    ],
    "spec.rollout": [
        _rule(
            f"!has(self.advance) || self.advance == 'BySteps' || {_STRATEGY} == 'Canary'",
            "OnEvidence belongs to Canary",
            ".advance",
        ),
        _rule(
            "!has(self.guard) || !has(self.guard.holdBackPercent) || double(self.guard.holdBackPercent) == 0.0"
            f" || {_STRATEGY} in ['Canary', 'ABTest']",
            "belongs to Canary and ABTest",
            ".guard.holdBackPercent",
        ),
        _rule(
            "!has(self.guard) || !has(self.guard.holdBackPercent) || !has(self.steps) || self.steps.all(s,"
            " double(s.weight) == 100.0 || double(s.weight) <= 100.0 - double(self.guard.holdBackPercent))",
            "leaves less than a step's weight",
            ".guard.holdBackPercent",
        ),
        _only("steps", "Canary"),
        _only("blueGreen", "BlueGreen"),
        _only("abTest", "ABTest"),
        _rule(f"!has(self.shadow) || {_STRATEGY} in ['Shadow', 'Canary']", "belongs to Shadow and Canary", ".shadow"),
        _rule(
            f"!has(self.shadow) || !has(self.shadow.onSuccess) || self.shadow.onSuccess != 'Promote' || {_STRATEGY} != 'Canary'",
            "belongs to Shadow; a Canary goes on to its steps",
            ".shadow.onSuccess",
        ),
        _rule(
            "!has(self.gates) || self.gates.all(g, !has(g.metric) || !g.metric.startsWith('shadow/'))"
            f" || has(self.shadow) || {_STRATEGY} == 'Shadow'"
            " || (has(self.blueGreen) && has(self.blueGreen.mirrorPercent) && self.blueGreen.mirrorPercent > 0.0)",
            "shadow/ needs copies: rollout.shadow, or rollout.blueGreen.mirrorPercent",
            ".gates",
        ),
    ],
    "spec.rollout.steps": [
        _rule(
            "self.map(s, double(s.weight)).isSorted()"
            " && self.all(s, self.exists_one(other, double(other.weight) == double(s.weight)))",
            "each weight must be greater than the step's before",
        ),
    ],
    "spec.rollout.steps.items": [
        _rule("!has(self.until) || has(self.maxRequests)", "is needed by until: Decided", ".maxRequests"),
        _rule("!has(self.maxRequests) || has(self.until)", "belongs to until: Decided", ".maxRequests"),
        _rule("!has(self.onUndecided) || has(self.until)", "belongs to until: Decided", ".onUndecided"),
        _rule(
            "!has(self.maxRequests) || !has(self.minRequests) || self.maxRequests >= self.minRequests",
            "must be at least minRequests",
            ".maxRequests",
        ),
    ],
    "spec.rollout.guard.window": [_DURATION],
    "spec.rollout.guard.holdBackPercent": [_DECIMALS],
    "spec.rollout.steps.items.weight": [_DECIMALS],
    "spec.rollout.steps.items.pause.duration": [_DURATION],
    "spec.rollout.blueGreen.mirrorPercent": [_DECIMALS],
    "spec.rollout.blueGreen.pause.duration": [_DURATION],
    "spec.rollout.abTest.bandit.minWeight": [_DECIMALS],
    "spec.rollout.abTest.bandit.maxChange": [_DECIMALS],
    "spec.rollout.abTest.bandit.interval": [_DURATION],
    "spec.rollout.abTest": [
        _rule(
            "!has(self.bandit) || (has(self.allocation) && self.allocation == 'Thompson')",
            "belongs to allocation Thompson",
            ".bandit",
        ),
        _rule(
            "!has(self.allocation) || self.allocation != 'Thompson' || !has(self.goal) || self.goal != 'latencyP99Ms'",
            "cannot be a percentile with allocation Thompson",
            ".goal",
        ),
        _rule(
            "!has(self.bandit) || ((has(self.bandit.minWeight) ? double(self.bandit.minWeight) : 10.0)"
            " <= (has(self.split) ? double(self.split) : 50.0) && (has(self.split) ? double(self.split) : 50.0)"
            " <= 100.0 - (has(self.bandit.minWeight) ? double(self.bandit.minWeight) : 10.0))",
            "leaves no room for the split it starts at",
            ".bandit.minWeight",
        ),
        _PROMOTE,
    ],
    "spec.rollout.abTest.split": [_DECIMALS],
    "spec.rollout.abTest.duration": [_DURATION],
    "spec.rollout.shadow": [
        _PROMOTE
        | {
            "rule": f"{_PROMOTE['rule']} || (has(self.minPairs) && self.minPairs > 0)",
            "message": "Promote needs minRequests, minPairs or duration",
        }
    ],
    "spec.rollout.shadow.mirrorPercent": [_DECIMALS],
    "spec.rollout.shadow.duration": [_DURATION],
    "spec.rollout.gates.items": [
        _rule("has(self.metric) != has(self.promql)", "needs exactly one of metric and promql"),
        _rule(
            "[has(self.max), has(self.min), has(self.compare)].filter(given, given).size() == 1",
            "needs exactly one of max, min and compare",
        ),
        *_forms("errorRate", "max", "compare"),
        *_forms("latencyP50Ms", "max", "compare"),
        *_forms("latencyP95Ms", "max", "compare"),
        *_forms("latencyP99Ms", "max", "compare"),
        *_forms("throughput", "min"),
        *_forms("drift/prediction", "max"),
        *_forms("shadow/labelFlipRate", "max"),
        *_forms("shadow/scoreShift", "max"),
        *_forms("shadow/maxAbsDiff", "max"),
        _rule(
            "!has(self.tensor) || (has(self.metric) && self.metric == 'shadow/maxAbsDiff')",
            "belongs to shadow/maxAbsDiff",
            ".tensor",
        ),
        _rule(
            "!has(self.metric) || self.metric != 'shadow/maxAbsDiff' || !has(self.max)"
            " || (self.max > 0.0 && self.max <= 1000000000.0)",
            "must be more than 0 and at most 1e9",
            ".max",
        ),
        *_forms("outcome/accuracy", "min", "compare"),
        *_forms("outcome/brier", "max", "compare"),
        *_forms("outcome/mae", "max", "compare"),
        *_forms("outcome/rmse", "max"),
        _rule(
            "!has(self.segment) || (has(self.metric)"
            " && (self.metric.startsWith('outcome/') || self.metric.startsWith('business/')))",
            "belongs to outcome/ and business/",
            ".segment",
        ),
        _rule(
            "has(self.better) == (has(self.metric) && self.metric.startsWith('business/') && has(self.compare))",
            "belongs to business/ with compare, which needs it",
            ".better",
        ),
        _rule(
            f"!has(self.margin) || self.margin < 1.0 || (has(self.metric) && {_VALUE})",
            "must be less than 1",
            ".margin",
        ),
        _rule(
            f"!has(self.valueRange) || (has(self.metric) && {_VALUE})",
            "belongs to business/, outcome/mae and outcome/rmse",
            ".valueRange",
        ),
        _rule(
            "!has(self.valueRange) || self.valueRange.size() != 2 || (self.valueRange[0] < self.valueRange[1]"
            " && (self.valueRange[0] == 0.0 || !has(self.metric) || self.metric.startsWith('business/')))",
            "needs the smallest value (of errors 0) and then a larger one",
            ".valueRange",
        ),
        _rule(
            "!has(self.margin) || !has(self.valueRange) || self.valueRange.size() != 2"
            " || self.margin < self.valueRange[1] - self.valueRange[0]",
            "must be less than the width of valueRange",
            ".margin",
        ),
        _rule(
            f"!has(self.maxSamples) || (!has(self.segment) && (has(self.valueRange) || !has(self.metric) || !{_VALUE}))",
            "needs valueRange for such a metric, and does not fit segment",
            ".maxSamples",
        ),
        _rule("!has(self.promql) || !has(self.compare)", "does not fit promql; use max or min", ".compare"),
        _rule("has(self.margin) == has(self.compare)", "belongs to compare, and compare needs it", ".margin"),
        _rule(
            "!has(self.failureLimit) || has(self.promql) || (has(self.metric) && self.metric == 'throughput')",
            "belongs to promql and throughput",
            ".failureLimit",
        ),
        _rule(
            "!has(self.confidence) || (has(self.metric) && self.metric != 'throughput')",
            "belongs to a test; queries and throughput have failureLimit",
            ".confidence",
        ),
        _rule(
            "!has(self.maxSamples) || (has(self.compare) && has(self.required) && self.required == 'Promotion')",
            "belongs to compare with required: Promotion",
            ".maxSamples",
        ),
        *_bound("max"),
        *_bound("min"),
    ],
    "spec.rollout.gates.items.promql": [
        _rule(
            r"self.findAll('(?s)\\{\\{.*?\\}\\}').all(name,"
            " name in ['{{model}}', '{{candidate}}', '{{stable}}', '{{namespace}}'])",
            "names something else than {{model}}, {{candidate}}, {{stable}} and {{namespace}}",
        ),
    ],
    "spec.server": [
        _rule(
            "!has(self.memoryMib) || (has(self.placement) && self.placement == 'Shared') || has(self.pool)",
            "belongs to placement Shared and to pool",
            ".memoryMib",
        ),
        *_pool(),
        _rule(
            "!has(self.batching) || !has(self.batching.preferredSizes)"
            " || self.batching.preferredSizes.all(n, n <= (has(self.maxBatchSize) ? self.maxBatchSize : 64))",
            "must be at most spec.server.maxBatchSize",
            ".batching.preferredSizes",
        ),
        _rule(
            "!has(self.modelWarmup) || !has(self.modelWarmup.batchSizes)"
            " || self.modelWarmup.batchSizes.all(n, n <= (has(self.maxBatchSize) ? self.maxBatchSize : 64))",
            "must be at most spec.server.maxBatchSize",
            ".modelWarmup.batchSizes",
        ),
        _rule(
            "!has(self.autoscaling) || !has(self.autoscaling.minReplicas) || self.autoscaling.minReplicas == 0"
            " || self.autoscaling.minReplicas >= (has(self.replicas) ? self.replicas : 1)",
            "must be at least spec.server.replicas, or 0",
            ".autoscaling.minReplicas",
        ),
        _rule(
            "!has(self.autoscaling) || !has(self.autoscaling.maxReplicas)"
            " || (self.autoscaling.maxReplicas >= (has(self.replicas) ? self.replicas : 1)"
            " && (!has(self.autoscaling.minReplicas) || self.autoscaling.maxReplicas >= self.autoscaling.minReplicas))",
            "must be at least minReplicas and spec.server.replicas",
            ".autoscaling.maxReplicas",
        ),
    ],
    "spec.server.batching.preferredSizes": [
        _rule(
            "self.isSorted() && self.all(n, self.exists_one(other, other == n))",
            "must be rising",
        ),
    ],
    "spec.server.batching": [
        _rule(
            "has(self.defaultPriority) == (has(self.priorityLevels) && self.priorityLevels > 0)",
            "belongs to priorityLevels, and priorityLevels needs it",
            ".defaultPriority",
        ),
        _rule(
            "!has(self.defaultPriority) || !has(self.priorityLevels) || self.priorityLevels == 0"
            " || self.defaultPriority <= self.priorityLevels",
            "must be at most priorityLevels",
            ".defaultPriority",
        ),
    ],
    "spec.server.rateLimit": [
        _rule(
            "(has(self.perInstance) ? self.perInstance : 1) <= self.total",
            "must be at least perInstance, or no instance could ever run",
            ".total",
        ),
    ],
    "spec.server.autoscaling.idleAfter": [_DURATION],
    "spec.server.pool.minResidence": [_DURATION],
    "spec.server.autoscaling": [
        _rule(
            "(has(self.target) ? self.target : '80%').endsWith('%')"
            " == ((has(self.metric) ? self.metric : 'cpu') == 'cpu')",
            "needs a percentage with cpu and a time like 5ms with queueTime",
            ".target",
        ),
        _rule(
            "has(self.idleAfter) == (has(self.minReplicas) && self.minReplicas == 0)",
            "belongs to minReplicas: 0, and minReplicas: 0 needs it",
            ".idleAfter",
        ),
        _rule(
            "has(self.maxReplicas) || (has(self.minReplicas) && self.minReplicas == 0)",
            "is needed, but with minReplicas: 0",
            ".maxReplicas",
        ),
    ],
    "spec.server.tolerations.items": [
        _rule(
            "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
            "belongs to operator Equal",
            ".value",
        ),
        _rule(
            "(has(self.operator) && self.operator == 'Exists') || has(self.key)", "is needed by operator Equal", ".key"
        ),
    ],
    # Keys of a map have no pattern of their own in a structural schema.
    "spec.server.nodeSelector": [
        _rule(
            r"self.all(key, size(key) <= 317"
            r" && key.matches('^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$'))",
            "needs names of labels",
        ),
    ],
}
"""Rules by the path of the schema they stand at."""
