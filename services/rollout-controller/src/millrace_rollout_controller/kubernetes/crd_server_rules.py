"""CEL rules of the block `server`; the same as `server_block.check_server`."""

from millrace_rollout_controller.kubernetes.cel import DURATION, Rule, demand


def _pool() -> list[Rule]:
    given = {
        "placement": "has(self.placement) && self.placement == 'Shared'", "replicas": "has(self.replicas) && self.replicas != 1",
        "resources": "has(self.resources) && (has(self.resources.limits) && size(self.resources.limits) > 0"
        " || has(self.resources.requests) && size(self.resources.requests) > 0)",
        "rateLimit": "has(self.rateLimit)", "responseCacheMib": "has(self.responseCacheMib) && self.responseCacheMib > 0",
    }  # fmt: skip
    message = "does not fit pool: the server is not this deployment's own"
    return [
        *(demand(f"!has(self.pool) || !({rule})", message, f".{field}") for field, rule in given.items()),
        demand(
            "!has(self.pool) || !has(self.pool.pinned) || !self.pool.pinned || !has(self.autoscaling)",
            "does not fit pool.pinned, which never sleeps",
            ".autoscaling",
        ),
        demand(
            "!has(self.pool) || !has(self.pool.capacityMib) || !has(self.memoryMib) || self.memoryMib <= self.pool.capacityMib",
            "must be at most pool.capacityMib, or it is never loaded",
            ".memoryMib",
        ),
    ]


SERVER: dict[str, list[Rule]] = {
    "spec.server": [
        demand(
            "!has(self.memoryMib) || (has(self.placement) && self.placement == 'Shared') || has(self.pool)",
            "belongs to placement Shared and to pool",
            ".memoryMib",
        ),
        *_pool(),
        demand(
            "!has(self.batching) || !has(self.batching.preferredSizes)"
            " || self.batching.preferredSizes.all(n, n <= (has(self.maxBatchSize) ? self.maxBatchSize : 64))",
            "must be at most spec.server.maxBatchSize",
            ".batching.preferredSizes",
        ),
        demand(
            "!has(self.modelWarmup) || !has(self.modelWarmup.batchSizes)"
            " || self.modelWarmup.batchSizes.all(n, n <= (has(self.maxBatchSize) ? self.maxBatchSize : 64))",
            "must be at most spec.server.maxBatchSize",
            ".modelWarmup.batchSizes",
        ),
        demand(
            "!has(self.autoscaling) || !has(self.autoscaling.minReplicas) || self.autoscaling.minReplicas == 0"
            " || self.autoscaling.minReplicas >= (has(self.replicas) ? self.replicas : 1)",
            "must be at least spec.server.replicas, or 0",
            ".autoscaling.minReplicas",
        ),
        demand(
            "!has(self.autoscaling) || !has(self.autoscaling.maxReplicas)"
            " || (self.autoscaling.maxReplicas >= (has(self.replicas) ? self.replicas : 1)"
            " && (!has(self.autoscaling.minReplicas) || self.autoscaling.maxReplicas >= self.autoscaling.minReplicas))",
            "must be at least minReplicas and spec.server.replicas",
            ".autoscaling.maxReplicas",
        ),
    ],
    "spec.server.batching.preferredSizes": [
        demand(
            "self.isSorted() && self.all(n, self.exists_one(other, other == n))",
            "must be rising",
        ),
    ],
    "spec.server.batching": [
        demand(
            "has(self.defaultPriority) == (has(self.priorityLevels) && self.priorityLevels > 0)",
            "belongs to priorityLevels, and priorityLevels needs it",
            ".defaultPriority",
        ),
        demand(
            "!has(self.defaultPriority) || !has(self.priorityLevels) || self.priorityLevels == 0"
            " || self.defaultPriority <= self.priorityLevels",
            "must be at most priorityLevels",
            ".defaultPriority",
        ),
    ],
    "spec.server.rateLimit": [
        demand(
            "(has(self.perInstance) ? self.perInstance : 1) <= self.total",
            "must be at least perInstance, or no instance could ever run",
            ".total",
        ),
    ],
    "spec.server.autoscaling.idleAfter": [DURATION],
    "spec.server.pool.minResidence": [DURATION],
    "spec.server.autoscaling": [
        demand(
            "(has(self.target) ? self.target : '80%').endsWith('%')"
            " == ((has(self.metric) ? self.metric : 'cpu') == 'cpu')",
            "needs a percentage with cpu and a time like 5ms with queueTime",
            ".target",
        ),
        demand(
            "has(self.idleAfter) == (has(self.minReplicas) && self.minReplicas == 0)",
            "belongs to minReplicas: 0, and minReplicas: 0 needs it",
            ".idleAfter",
        ),
        demand(
            "has(self.maxReplicas) || (has(self.minReplicas) && self.minReplicas == 0)",
            "is needed, but with minReplicas: 0",
            ".maxReplicas",
        ),
    ],
    "spec.server.tolerations.items": [
        demand(
            "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
            "belongs to operator Equal",
            ".value",
        ),
        demand(
            "(has(self.operator) && self.operator == 'Exists') || has(self.key)", "is needed by operator Equal", ".key"
        ),
    ],
    # Keys of a map have no pattern of their own in a structural schema.
    "spec.server.nodeSelector": [
        demand(
            r"self.all(key, size(key) <= 317"
            r" && key.matches('^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$'))",
            "needs names of labels",
        ),
    ],
}
"""Rules by the path of the schema they stand at."""
