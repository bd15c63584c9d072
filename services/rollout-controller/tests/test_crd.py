"""The CRD and the parser say the same about a manifest: each refuses what the other refuses, at the same field. Real API server."""

import asyncio
import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller import manifest
from millrace_rollout_controller.kubernetes import crd
from millrace_rollout_controller.kubernetes.api import ApiError

from . import cluster
from .cluster import World
from .test_manifest import GOOD, STICKY

ROOT = Path(__file__).parents[3]
SAMPLES = sorted((ROOT / "deploy/samples/flights/manifests").glob("*.yaml"))
GATE = "spec/rollout/gates/0"
SCALING = "spec/server/autoscaling"
ON = {"maxReplicas": 4}
CASES: list[tuple[str, Any]] = [
    ("metadata/name", "flight-delay"),
    ("metadata/name", "Bad Name"),
    ("metadata/name", "a.b"),
    ("metadata/name", "a" * 64),
    ("spec/model", ""),
    ("spec/model", "Flight"),
    ("spec/model", "flight_delay"),
    ("spec/model", "f" * 64),
    ("spec/version", 1.4),
    ("spec/version", "latest"),
    ("spec/version", "1.4"),
    ("spec/version", "01.4.0"),
    ("spec/version", "1.4.0-rc.1+build.5"),
    ("spec/version", "1.4.0-01"),
    ("spec/version", "1.4.0-" + "a" * 123),
    ("spec/version", ...),
    ("spec/model", ...),
    ("spec/replicas", 2),
    ("spec/server/replicas", 0),
    ("spec/server/replicas", 33),
    ("spec/server/replicas", 32),
    ("spec/server/replicas", True),
    ("spec/server/maxBatchSize", "64"),
    ("spec/server/maxBatchSize", 0),
    ("spec/server/max_batch_size", 64),
    ("spec/server/timeoutMs", 0),
    ("spec/server/instances", 17),
    ("spec/server/queueDelayUs", -1),
    ("spec/server/placement", "Beside"),
    ("spec/server/memoryMib", 512),
    ("spec/server", {"placement": "Shared", "memoryMib": 512}),
    ("spec/server", {"placement": "Shared", "memoryMib": 0}),
    ("spec/server", {"pool": {"name": "small", "capacityMib": 700, "minResidence": "30s"}, "memoryMib": 512}),
    ("spec/server", {"pool": {"name": "Small"}}),
    ("spec/server", {"pool": {"name": "small", "minResidence": "0s"}}),
    ("spec/server", {"pool": {"name": "small", "capacityMib": 10}, "memoryMib": 20}),
    ("spec/server", {"pool": {"name": "small"}, "replicas": 2}),
    ("spec/server", {"pool": {"name": "small"}, "placement": "Shared"}),
    ("spec/server", {"pool": {"name": "small"}, "resources": {"limits": {"cpu": 1}}}),
    ("spec/server", {"pool": {"name": "small"}, "responseCacheMib": 1}),
    ("spec/server", {"pool": {"name": "small"}, "rateLimit": {"total": 1}}),
    ("spec/server", {"pool": {"name": "s", "pinned": True}, "autoscaling": {"minReplicas": 0, "idleAfter": "9m"}}),
    ("spec/server/resources/limits", {"nvidia.com/gpu": 1, "memory": "2Gi", "cpu": "500m"}),
    ("spec/server/resources/limits", {"nvidia.com/mig-1g.10gb": "1"}),
    ("spec/server/resources/limits", {"cpu": "lots"}),
    ("spec/server/resources/limits", {"cpu": -1}),
    ("spec/server/resources/limits", {"cpu": True}),
    ("spec/server/resources/limits", {f"x{i}": 1 for i in range(17)}),
    ("spec/server/resources/requests", {"cpu": 1}),
    ("spec/server/nodeSelector", {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}),
    ("spec/server/nodeSelector", {"a": "b c"}),
    ("spec/server/nodeSelector", {"bad key": "b"}),
    ("spec/server/tolerations", [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]),
    ("spec/server/tolerations", [{"operator": "Exists"}]),
    ("spec/server/tolerations", [{"operator": "Exists", "value": "x"}]),
    ("spec/server/tolerations", [{"value": "x"}]),
    ("spec/server/tolerations", [{"key": "gpu", "effect": "Never"}]),
    (
        "spec/server/affinity",
        {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
    ),
    ("spec/server/affinity", "near"),
    ("spec/server/topologySpreadConstraints", [{"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 2}]),
    ("spec/server/topologySpreadConstraints", [{"maxSkew": 2}]),
    ("spec/server/topologySpreadConstraints", [{"topologyKey": "zone", "whenUnsatisfiable": "Cry"}]),
    ("spec/server/runtimeClassName", "nvidia"),
    ("spec/server/runtimeClassName", "No"),
    ("spec/server/priorityClassName", "high"),
    (SCALING, {"minReplicas": 0, "idleAfter": "15m"}),
    (SCALING, {"minReplicas": 0, "idleAfter": "15m", "maxReplicas": 4}),
    (SCALING, {"minReplicas": 0, "maxReplicas": 4}),
    (SCALING, {"idleAfter": "15m", "maxReplicas": 4}),
    (SCALING, {"minReplicas": 0, "idleAfter": "0s"}),
    (SCALING, {"minReplicas": 0, "idleAfter": "soon"}),
    (SCALING, ON),
    (SCALING, {}),
    (SCALING, {"minReplicas": 3, "maxReplicas": 4}),
    (SCALING, {"minReplicas": 1, "maxReplicas": 4}),
    (SCALING, {"maxReplicas": 1}),
    (SCALING, {"minReplicas": 5, "maxReplicas": 4}),
    (SCALING, ON | {"metric": "queueTime", "target": "5ms"}),
    (SCALING, ON | {"metric": "queueTime"}),
    (SCALING, ON | {"metric": "cpu", "target": "70%"}),
    (SCALING, ON | {"metric": "cpu", "target": "5ms"}),
    (SCALING, ON | {"target": "0%"}),
    (SCALING, ON | {"metric": "luck"}),
    ("spec/server/batching", {}),
    ("spec/server/batching", {"preferredSizes": [8, 16], "maxQueueSize": 100, "queueTimeoutUs": 50_000}),
    ("spec/server/batching", {"preferredSizes": [16, 8]}),
    ("spec/server/batching", {"preferredSizes": [8, 8]}),
    ("spec/server/batching", {"preferredSizes": [65]}),
    ("spec/server/batching", {"priorityLevels": 2, "defaultPriority": 2}),
    ("spec/server/batching", {"priorityLevels": 2, "defaultPriority": 3}),
    ("spec/server/batching", {"priorityLevels": 2}),
    ("spec/server/batching", {"defaultPriority": 1}),
    ("spec/server/batching", {"queueDelayUs": 1}),
    ("spec/server/rateLimit", {"total": 2}),
    ("spec/server/rateLimit", {"total": 2, "perInstance": 3}),
    ("spec/server/rateLimit", {}),
    ("spec/server/responseCacheMib", 16),
    ("spec/server/responseCacheMib", -1),
    ("spec/server/modelWarmup", {"batchSizes": [1, 8], "count": 3}),
    ("spec/server/modelWarmup", {"batchSizes": []}),
    ("spec/server/modelWarmup", {"batchSizes": [100]}),
    ("spec/routing/sticky/header", "X-User"),
    ("spec/routing/sticky/header", ""),
    ("spec/routing/rules/0/to", "nobody"),
    ("spec/routing/rules/0/when", ""),
    ("spec/routing/rules/0/when", "x" * 2049),
    ("spec/balancing", "Random"),
    ("spec/balancing", "RoundRobin"),
    ("spec/rollout/strategy", "BlueGreen"),
    ("spec/rollout/strategy", ...),
    ("spec/rollout/blueGreen", {}),
    ("spec/rollout/abTest", {}),
    ("spec/rollout/shadow", {}),
    ("spec/rollout/strategy", "Sideways"),
    ("spec/rollout/steps", []),
    ("spec/rollout/steps", [{"weight": 1 + i} for i in range(21)]),
    ("spec/rollout/steps", [{"weight": 1 + i} for i in range(20)]),
    (
        "spec/rollout/steps",
        [{"weight": 0.07}, {"weight": 33.33}, {"weight": 50.05}, {"weight": 99.99}, {"weight": 100}],
    ),
    ("spec/rollout/steps/1/weight", 5),
    ("spec/rollout/steps/1/weight", 4.99),
    ("spec/rollout/steps/1/weight", 101),
    ("spec/rollout/steps/0/weight", 0),
    ("spec/rollout/steps/1/weight", 20.001),
    ("spec/rollout/steps/1/weight", "20"),
    ("spec/rollout/steps/1/weight", ...),
    ("spec/rollout/steps/0/minRequests", -1),
    ("spec/rollout/steps/0/minRequests", 1.5),
    ("spec/rollout/steps/1/pause/duration", "soon"),
    ("spec/rollout/steps/1/pause/duration", "0s"),
    ("spec/rollout/steps/1/pause/duration", ""),
    ("spec/rollout/steps/1/pause/duration", "720h"),
    ("spec/rollout/steps/1/pause/duration", "720h1s"),
    ("spec/rollout/steps/1/pause/duration", "999999h999999m999999s"),
    ("spec/rollout/steps/0/until", "Decided"),
    ("spec/rollout/steps/0/maxRequests", 500),
    ("spec/rollout/steps/0/onUndecided", "Hold"),
    ("spec/rollout/steps/0", {"weight": 5, "until": "Decided", "maxRequests": 500, "onUndecided": "Rollback"}),
    ("spec/rollout/steps/0", {"weight": 5, "until": "Decided", "maxRequests": 500, "minRequests": 501}),
    ("spec/rollout/advance", "OnEvidence"),
    ("spec/rollout/advance", "Backwards"),
    ("spec/rollout/countedBy", "Servers"),
    ("spec/rollout/countedBy", "Nobody"),
    ("spec/rollout/guard", {"window": "24h", "holdBackPercent": 5}),
    ("spec/rollout/guard", {}),
    ("spec/rollout/guard", {"window": "721h"}),
    ("spec/rollout/guard", {"window": "1h", "holdBackPercent": 0.001}),
    ("spec/rollout/guard", {"window": "1h", "holdBackPercent": 50}),
    ("spec/rollout/guard", {"window": "1h", "holdBackPercent": 51}),
    ("spec/rollout/gates", [{"metric": "errorRate", "max": 0.1 + i / 100} for i in range(21)]),
    (f"{GATE}/metric", "vibes"),
    (f"{GATE}/max", 0),
    (f"{GATE}/max", 1),
    (f"{GATE}/min", 0.1),
    (GATE, {"metric": "errorRate", "min": 0.1}),
    (GATE, {"metric": "latencyP99Ms", "min": 1}),
    (GATE, {"metric": "latencyP99Ms", "max": 600_001}),
    (GATE, {"metric": "latencyP99Ms", "max": 600_000}),
    (GATE, {"metric": "latencyP99Ms", "compare": "notWorseThanStable", "margin": 0.1}),
    (GATE, {"metric": "latencyP50Ms", "max": 20}),
    (GATE, {"metric": "latencyP95Ms", "compare": "notWorseThanStable", "margin": 0.1}),
    (GATE, {"metric": "latencyP95Ms", "min": 1}),
    (GATE, {"metric": "throughput", "min": 50, "failureLimit": 2}),
    (GATE, {"metric": "throughput", "min": 0}),
    (GATE, {"metric": "throughput", "max": 50}),
    (GATE, {"metric": "throughput", "min": 50, "confidence": 0.9}),
    (GATE, {"metric": "drift/prediction", "max": 0.1}),
    (GATE, {"metric": "drift/prediction", "max": 1}),
    (GATE, {"metric": "drift/prediction", "compare": "notWorseThanStable", "margin": 0.1}),
    (GATE, {"metric": "errorRate", "max": 0.1, "maxSamples": 1000, "required": "Promotion"}),
    ("spec/rollout/gates/2/maxSamples", 1000),
    (
        "spec/rollout/gates/2",
        {
            "metric": "outcome/accuracy",
            "compare": "notWorseThanStable",
            "margin": 0.1,
            "maxSamples": 1000,
            "required": "Promotion",
        },
    ),
    (GATE, {"metric": "outcome/accuracy", "max": 0.5}),
    (GATE, {"metric": "outcome/accuracy", "min": 0.5}),
    (GATE, {"metric": "outcome/brier", "min": 0.5}),
    (GATE, {"metric": "outcome/brier", "compare": "notWorseThanStable", "margin": 1}),
    (GATE, {"metric": "errorRate", "compare": "better", "margin": 0.1}),
    (GATE, {"metric": "business/revenue", "min": -5}),
    (GATE, {"metric": "business/", "min": 5}),
    (GATE, {"metric": "business/revenue", "min": 2e12}),
    (GATE, {"metric": "business/revenue", "max": 5, "valueRange": [0, 10], "segment": "feature/origin hub"}),
    (GATE, {"metric": "business/revenue", "max": 5, "valueRange": [10, 0]}),
    (GATE, {"metric": "business/revenue", "max": 5, "valueRange": [5, 10]}),
    (GATE, {"metric": "business/revenue", "max": 5, "valueRange": [10]}),
    (GATE, {"metric": "business/revenue", "max": 5, "better": "Lower"}),
    (GATE, {"metric": "business/revenue", "compare": "notWorseThanStable", "margin": 5}),
    (GATE, {"metric": "business/revenue", "compare": "notWorseThanStable", "margin": 5, "better": "Higher"}),
    (
        GATE,
        {"metric": "business/a", "compare": "notWorseThanStable", "margin": 5, "better": "Lower", "valueRange": [0, 5]},
    ),
    (
        GATE,
        {
            "metric": "business/a",
            "compare": "notWorseThanStable",
            "margin": 5,
            "better": "Lower",
            "valueRange": [0, 9],
            "maxSamples": 500,
            "required": "Promotion",
        },
    ),
    (
        GATE,
        {
            "metric": "business/a",
            "compare": "notWorseThanStable",
            "margin": 5,
            "better": "Lower",
            "maxSamples": 500,
            "required": "Promotion",
        },
    ),
    (GATE, {"metric": "outcome/mae", "max": 12}),
    (GATE, {"metric": "outcome/mae", "max": 0}),
    (GATE, {"metric": "outcome/mae", "max": 5, "valueRange": [1, 10]}),
    (GATE, {"metric": "outcome/rmse", "min": 12}),
    (GATE, {"metric": "outcome/rmse", "compare": "notWorseThanStable", "margin": 12}),
    (
        GATE,
        {
            "metric": "outcome/rmse",
            "compare": "notWorseThanStable",
            "margin": 2,
            "valueRange": [0, 9],
            "maxSamples": 500,
            "required": "Promotion",
        },
    ),
    (GATE, {"metric": "outcome/accuracy", "min": 0.5, "segment": "outcome/carrier"}),
    (GATE, {"metric": "outcome/accuracy", "min": 0.5, "segment": "carrier"}),
    (GATE, {"metric": "errorRate", "max": 0.5, "segment": "client"}),
    (GATE, {"metric": "errorRate", "max": 0.5, "valueRange": [0, 1]}),
    (f"{GATE}/margin", 0.1),
    ("spec/rollout/gates/2/margin", ...),
    ("spec/rollout/gates/2/confidence", 1),
    ("spec/rollout/gates/2/confidence", 0.5),
    (f"{GATE}/required", "Sometimes"),
    (f"{GATE}/promql", "up"),
    (GATE, {"max": 1}),
    (GATE, {"promql": "up"}),
    (GATE, {"promql": "up", "max": 1, "min": 0}),
    (GATE, {"promql": "", "max": 1}),
    (GATE, {"promql": "x" * 2001, "max": 1}),
    (GATE, {"promql": "up{a='{{version}}'}", "max": 1}),
    (GATE, {"promql": "up{a='{{ model }}'}", "max": 1}),
    (GATE, {"promql": "up{a='{{\n}}'}", "max": 1}),
    (
        GATE,
        {
            "promql": "up{a='{{model}}',b='{{candidate}}',c='{{stable}}',d='{{namespace}}'}",
            "min": -5,
            "failureLimit": 2,
        },
    ),
    (GATE, {"promql": "up", "compare": "notWorseThanStable", "margin": 0.1}),
    (GATE, {"promql": "up", "max": 1, "confidence": 0.9}),
    (GATE, {"promql": "up", "max": 1, "failureLimit": 0}),
    (f"{GATE}/failureLimit", 2),
    ("spec/rollout/onFailure", "Shrug"),
    ("spec/rollout/warmup", {}),
    ("spec/rollout/warmup", {"requests": 100, "maxTrials": 5, "maxP99Ratio": 1.2, "required": "Never"}),
    ("spec/rollout/warmup", {"requests": 9}),
    ("spec/rollout/warmup", {"maxTrials": 2}),
    ("spec/rollout/warmup", {"windowSeconds": 0.5, "maxRate": 50}),
    ("spec/rollout/warmup", {"windowSeconds": 61}),
    ("spec/rollout/warmup", {"maxRate": 0}),
    ("spec/rollout/warmup", {"maxP99Ratio": 0.5}),
    ("spec/rollout/warmup", {"required": "EveryStep"}),
    ("spec/rollout/warmup", {"seconds": 5}),
    ("spec/rollout/progressDeadlineSeconds", 0),
    *(
        ("spec", {"model": "m", "version": "1.0.0", "routing": routing, "rollout": rollout})
        for routing, rollout in [
            (STICKY, {"strategy": "BlueGreen", "blueGreen": {"mirrorPercent": 5.5, "pause": {}, "watchSeconds": 60}}),
            (STICKY, {"strategy": "BlueGreen", "blueGreen": {"split": 5}}),
            (STICKY, {"strategy": "BlueGreen", "advance": "OnEvidence"}),
            (STICKY, {"strategy": "BlueGreen", "guard": {"window": "1h"}}),
            (STICKY, {"strategy": "BlueGreen", "guard": {"window": "1h", "holdBackPercent": 5}}),
            (STICKY, {"strategy": "BlueGreen", "blueGreen": {"mirrorPercent": 101}}),
            (STICKY, {"strategy": "BlueGreen", "blueGreen": {"mirrorPercent": 0.001}}),
            (STICKY, {"strategy": "BlueGreen", "blueGreen": {"pause": {"duration": "0s"}}}),
            (STICKY, {"strategy": "BlueGreen", "shadow": {}}),
            (STICKY, {"strategy": "ABTest"}),
            ({}, {"strategy": "ABTest"}),
            (STICKY, {"strategy": "ABTest", "abTest": {"split": 100}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"split": 12.345}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"duration": "721h"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"onSuccess": "Promote"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"onSuccess": "Promote", "minRequests": 0}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"onSuccess": "Promote", "minRequests": 5}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"goal": "latencyP50Ms"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"allocation": "Thompson"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"allocation": "Greedy"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"bandit": {}}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"allocation": "Thompson", "bandit": {"minWeight": 5}}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"allocation": "Thompson", "bandit": {"minWeight": 51}}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"allocation": "Thompson", "bandit": {}, "split": 5}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"allocation": "Thompson", "bandit": {"interval": "0s"}}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"allocation": "Thompson", "bandit": {"maxChange": 0}}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"allocation": "Thompson", "goal": "latencyP99Ms"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"goal": "business/revenue", "better": "Higher"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"goal": "business/revenue"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"goal": "outcome/accuracy", "better": "Higher"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"better": "Lower"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"goal": "business/a-b", "better": "Higher"}}),
            (
                STICKY,
                {
                    "strategy": "ABTest",
                    "abTest": {"goal": "outcome/rmse", "valueRange": [0, 60], "segment": "outcome/carrier"},
                },
            ),
            (STICKY, {"strategy": "ABTest", "abTest": {"goal": "outcome/rmse", "valueRange": [1, 60]}}),
            (
                STICKY,
                {"strategy": "ABTest", "abTest": {"goal": "business/x", "better": "Lower", "valueRange": [-5, 60]}},
            ),
            (STICKY, {"strategy": "ABTest", "abTest": {"goal": "business/x", "better": "Lower", "valueRange": [9, 6]}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"valueRange": [0, 1]}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"segment": "client"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"goal": "errorRate", "segment": "client"}}),
            (STICKY, {"strategy": "ABTest", "abTest": {"goal": "outcome/mae", "segment": "carrier"}}),
            ({}, {"strategy": "Shadow", "shadow": {"mirrorPercent": 0}}),
            ({}, {"strategy": "Shadow", "shadow": {"onSuccess": "Promote"}}),
            ({}, {"strategy": "Shadow", "shadow": {"onSuccess": "Promote", "duration": "1h"}}),
            ({}, {"strategy": "Shadow", "shadow": {"onSuccess": "Promote", "minPairs": 100}}),
            ({}, {"strategy": "Shadow", "shadow": {"segment": {"header": "X-Country"}}}),
            ({}, {"strategy": "Shadow", "gates": [{"metric": "shadow/labelFlipRate", "max": 0.01}]}),
            ({}, {"strategy": "Canary", "shadow": {"minPairs": 100, "segment": {"header": "x-country"}}}),
            ({}, {"strategy": "Canary", "shadow": {"minPairs": 100, "onSuccess": "Promote"}}),
            ({}, {"strategy": "Canary", "gates": [{"metric": "shadow/labelFlipRate", "max": 0.01}]}),
            ({}, {"shadow": {}, "gates": [{"metric": "shadow/scoreShift", "max": 0.01}]}),
            ({}, {"shadow": {}, "gates": [{"metric": "shadow/scoreShift", "min": 0.01}]}),
            ({}, {"shadow": {}, "gates": [{"metric": "shadow/scoreShift", "max": 1}]}),
            ({}, {"shadow": {}, "gates": [{"metric": "shadow/scoreShift", "max": 0.1, "tensor": "p"}]}),
            ({}, {"shadow": {}, "gates": [{"metric": "shadow/maxAbsDiff", "max": 5, "tensor": "p"}]}),
            ({}, {"shadow": {}, "gates": [{"metric": "shadow/maxAbsDiff", "max": 0}]}),
            ({}, {"strategy": "BlueGreen", "blueGreen": {}, "gates": [{"metric": "shadow/maxAbsDiff", "max": 1}]}),
            (
                {},
                {
                    "strategy": "BlueGreen",
                    "blueGreen": {"mirrorPercent": 5},
                    "gates": [{"metric": "shadow/maxAbsDiff", "max": 1}],
                },
            ),
            ({"rules": [{"when": "true", "to": "candidate"}]}, {"strategy": "Shadow"}),
            ({"rules": [{"when": "true", "to": "stable"}]}, {"strategy": "Shadow"}),
            ({}, {"countedBy": "Servers"}),
            ({"hedgeAfterMs": 5}, {"countedBy": "Servers"}),
            ({"testers": ["ann"]}, {"countedBy": "Gateways"}),
            ({"testers": ["ann"]}, {"countedBy": "Servers"}),
            ({"callers": ["ann"]}, {"countedBy": "Servers"}),
            ({"rules": [{"when": "true", "to": "stable"}]}, {"countedBy": "Servers"}),
        ]
    ),
]


@pytest.fixture
async def world(control_plane: Path) -> AsyncIterator[World]:
    async with cluster.world(control_plane) as made:
        yield made


def changed(path: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(GOOD)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
    at: Any = made
    for part in parents:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return made


def parsed(document: dict[str, Any]) -> str:
    """The field the parser refuses; empty when it takes the manifest."""
    try:
        manifest.parse(yaml.safe_dump(document))
    except InvalidArgumentError as error:
        return error.field
    return ""


async def applied(world: World, document: dict[str, Any]) -> tuple[str, ...]:
    """The fields the API server refuses; none when it takes the manifest."""
    query = {"dryRun": "All", "fieldValidation": "Strict"}
    try:
        await world.cluster._send("POST", world.path("modeldeployments"), query, document, "application/json")
    except ApiError as error:
        if error.status not in {400, 422}:
            raise
        return tuple(field for field, _message in error.causes) or (error.message,)
    return ()


AT_ONCE = 16


@pytest.mark.kubernetes
async def test_parser_and_api_server_agree(world: World) -> None:
    documents = [changed(path, value) for path, value in CASES]
    answers = []
    for at in range(0, len(documents), AT_ONCE):
        # All at once, the last one's deadline would be the wait for all the others.
        answers += await asyncio.gather(*(applied(world, document) for document in documents[at : at + AT_ONCE]))
    wrong = []
    for (path, value), document, refused in zip(CASES, documents, answers, strict=True):
        field = parsed(document)
        same = not field if not refused else any(field and (field in f or (f and field.startswith(f))) for f in refused)
        if not same:
            wrong.append(f"{path} = {str(value)[:80]}: parser refuses {field!r}, API server {refused}")
    assert not wrong, "\n".join(wrong)
    assert sum(not refused for refused in answers) > 25
    assert sum(bool(refused) for refused in answers) > 90


@pytest.mark.kubernetes
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
async def test_samples_apply(world: World, path: Path) -> None:
    await cluster.kubectl(world.kubeconfig, "-n", world.namespace, "apply", "-f", str(path))


@pytest.mark.kubernetes
async def test_kubectl_names_the_field(world: World) -> None:
    async def refused(document: dict[str, Any]) -> str:
        arguments = ("-n", world.namespace, "apply", "-f", "-")
        return await cluster.kubectl(world.kubeconfig, *arguments, stdin=yaml.safe_dump(document), check=False)

    assert "spec.rollout.gates[0].min: Invalid value" in await refused(
        changed(GATE, {"metric": "errorRate", "min": 0.1})
    )
    assert 'unknown field "spec.server.gpus"' in await refused(changed("spec/server/gpus", 1))
    assert "created" in await refused(GOOD)
    said = await refused(changed("spec/model", "other"))
    assert "spec.model" in said
    assert "cannot change; delete the deployment first" in said
    said = await refused(changed("spec/server/placement", "Shared"))
    assert "spec.server.placement" in said
    assert "cannot change; delete the deployment first" in said


def test_the_charts_file_is_made_from_the_manifest() -> None:
    path = ROOT / "charts/millrace-crds" / crd.FILE
    assert path.read_text(encoding="utf-8") == crd.chart_file(), "run make crd"


def test_every_property_is_described() -> None:
    bare = []

    def look(schema: dict[str, Any], path: str) -> None:
        for name, one in schema.get("properties", {}).items():
            if "description" not in one and "enum" not in one and one.get("type") != "boolean":
                bare.append(f"{path}.{name}")
            look(one, f"{path}.{name}")
        if "items" in schema:
            look(schema["items"], f"{path}[]")

    look(crd.at(crd.definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"], "root.spec"), "spec")
    # The names say it all.
    assert set(bare) <= {f"spec.{name}" for name in BARE}, bare


BARE = {
    "model", "version", "rollout.strategy", "rollout.gates", "rollout.gates[].max", "rollout.gates[].min",
    "routing.rules[].when", "rollout.steps[].weight", "rollout.steps[].pause.duration", "routing.rules",
    "rollout.blueGreen.pause.duration", "server.tolerations[].key", "server.tolerations[].value",
    "server.tolerations[].tolerationSeconds", "server.topologySpreadConstraints[].maxSkew",
    "server.topologySpreadConstraints[].topologyKey", "metadata.name",
}  # fmt: skip
