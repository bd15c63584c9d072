"""Manifests: every wrong thing is refused with its path."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller import manifest
from millrace_rollout_controller.stages import stages

GOOD = yaml.safe_load("""
apiVersion: millrace.dev/v1alpha1
kind: ModelDeployment
metadata: {name: flight-delay}
spec:
  model: flight-delay
  version: 1.4.0
  server: {replicas: 2, resources: {limits: {cpu: 2, memory: 1Gi}}, maxBatchSize: 64, timeoutMs: 100}
  routing:
    sticky: {header: x-user-id}
    rules: [{when: "request.headers['x-user-type'] == 'premium'", to: candidate}]
  balancing: LeastRequest
  rollout:
    strategy: Canary
    steps: [{weight: 5, minRequests: 500}, {weight: 20, pause: {duration: 1h30m}}, {weight: 50.5, pause: {}}]
    gates:
      - {metric: errorRate, max: 0.05}
      - {metric: latencyP99Ms, max: 500, required: Promotion}
      - {metric: outcome/accuracy, compare: notWorseThanStable, margin: 0.01, confidence: 0.99}
      - {metric: outcome/brier, max: 0.2, required: Never}
    onFailure: Rollback
""")


def changed(path: str, value: Any) -> str:
    made = copy.deepcopy(GOOD)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
    at: Any = made
    for part in parents:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return yaml.safe_dump(made)


def test_a_whole_manifest() -> None:
    spec = manifest.parse(yaml.safe_dump(GOOD)).spec
    assert manifest.parse(json.dumps(GOOD)).spec == spec
    assert [stage.weight for stage in stages(spec)] == [5, 20, 50.5, 100]
    assert stages(spec)[1].lasts_s == 5400
    assert stages(spec)[2].until_resume
    assert [gate.text for gate in spec.rollout.gates] == [
        "errorRate <= 0.05",
        "latencyP99Ms <= 500",
        "outcome/accuracy notWorseThanStable (margin 0.01)",
        "outcome/brier <= 0.2",
    ]


def test_defaults_bring_a_version_straight_to_all_traffic() -> None:
    text = "apiVersion: millrace.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: a}\nspec: {model: a, version: 1.0.0}"
    assert [stage.weight for stage in stages(manifest.parse(text).spec)] == [100]


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("apiVersion", "v1", "apiVersion"),
        ("kind", "Deployment", "kind"),
        ("metadata/name", "Bad Name", "metadata.name"),
        ("spec/model", "", "spec.model"),
        ("spec/version", 1.4, "spec.version"),
        ("spec/version", "latest", "spec.version"),
        ("spec/version", ..., "spec.version"),
        ("spec/replicas", 2, "spec.replicas"),
        ("spec/server/replicas", 0, "spec.server.replicas"),
        ("spec/server/replicas", True, "spec.server.replicas"),
        ("spec/server/autoscaling", {}, "spec.server.autoscaling.maxReplicas"),
        ("spec/server/maxBatchSize", "64", "spec.server.maxBatchSize"),
        ("spec/server/max_batch_size", 64, "spec.server.max_batch_size"),
        ("spec/routing/sticky/header", "X User", "spec.routing.sticky.header"),
        ("spec/routing/rules/0/when", "request.headers[", "spec.routing.rules[0].when"),
        ("spec/routing/rules/0/when", "features['a'] == 'much'", "spec.routing.rules[0].when"),
        ("spec/routing/rules/0/to", "nobody", "spec.routing.rules[0].to"),
        ("spec/routing", {"hedgeAfterMs": 0}, "spec.routing.hedgeAfterMs"),
        ("spec/routing", {"callers": []}, "spec.routing.callers"),
        ("spec/routing", {"testers": ["a b"]}, "spec.routing.testers[0]"),
        ("spec", GOOD["spec"] | {"balancing": "ConsistentHash", "routing": {}}, "spec.routing.sticky"),
        ("spec/balancing", "Random", "spec.balancing"),
        ("spec/rollout/strategy", "BlueGreen", "spec.rollout.steps"),
        ("spec/rollout/blueGreen", {}, "spec.rollout.blueGreen"),
        ("spec/rollout/abTest", {}, "spec.rollout.abTest"),
        ("spec/rollout/shadow", {"onSuccess": "Promote", "minPairs": 5}, "spec.rollout.shadow.onSuccess"),
        ("spec/rollout/strategy", "Sideways", "spec.rollout.strategy"),
        ("spec/rollout/steps", [], "spec.rollout.steps"),
        ("spec/rollout/steps/1/weight", 5, "spec.rollout.steps[1].weight"),
        ("spec/rollout/steps/1/weight", 101, "spec.rollout.steps[1].weight"),
        ("spec/rollout/steps/1/weight", 20.001, "spec.rollout.steps[1].weight"),
        ("spec/rollout/steps/1/weight", "20", "spec.rollout.steps[1].weight"),
        ("spec/rollout/steps/0/minRequests", -1, "spec.rollout.steps[0].minRequests"),
        ("spec/rollout/steps/1/pause/duration", "soon", "spec.rollout.steps[1].pause.duration"),
        ("spec/rollout/steps/1/pause/duration", "0s", "spec.rollout.steps[1].pause.duration"),
        ("spec/rollout/steps/1/pause/duration", "", "spec.rollout.steps[1].pause.duration"),
        ("spec/rollout/gates/0/metric", "vibes", "spec.rollout.gates[0].metric"),
        ("spec/rollout/gates/0/max", 0, "spec.rollout.gates[0].max"),
        ("spec/rollout/gates/0/min", 0.1, "spec.rollout.gates[0]"),
        ("spec/rollout/gates/0", {"metric": "errorRate", "min": 0.1}, "spec.rollout.gates[0].min"),
        ("spec/rollout/gates/0/margin", 0.1, "spec.rollout.gates[0].margin"),
        ("spec/rollout/gates/2/margin", ..., "spec.rollout.gates[2].margin"),
        ("spec/rollout/gates/2/confidence", 1, "spec.rollout.gates[2].confidence"),
        ("spec/rollout/gates/0/promql", "up", "spec.rollout.gates[0]"),
        ("spec/rollout/gates/0", {"max": 1}, "spec.rollout.gates[0]"),
        ("spec/rollout/gates/0", {"promql": "up"}, "spec.rollout.gates[0]"),
        ("spec/rollout/gates/0", {"promql": "up", "max": 1, "min": 0}, "spec.rollout.gates[0]"),
        ("spec/rollout/gates/0", {"promql": "", "max": 1}, "spec.rollout.gates[0].promql"),
        ("spec/rollout/gates/0", {"promql": "x" * 2001, "max": 1}, "spec.rollout.gates[0].promql"),
        ("spec/rollout/gates/0", {"promql": "up{a='{{version}}'}", "max": 1}, "spec.rollout.gates[0].promql"),
        ("spec/rollout/gates/0", {"promql": "up", "compare": "notWorseThanStable"}, "spec.rollout.gates[0].compare"),
        ("spec/rollout/gates/0", {"promql": "up", "max": 1, "confidence": 0.9}, "spec.rollout.gates[0].confidence"),
        ("spec/rollout/gates/0", {"promql": "up", "max": 1, "failureLimit": 0}, "spec.rollout.gates[0].failureLimit"),
        ("spec/rollout/gates/0/failureLimit", 2, "spec.rollout.gates[0].failureLimit"),
        ("spec/rollout/onFailure", "Shrug", "spec.rollout.onFailure"),
    ],
)
def test_a_wrong_value_names_its_path(path: str, value: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        manifest.parse(changed(path, value))
    assert caught.value.field == field, caught.value.message


def of_strategy(rollout: dict[str, Any], **routing: Any) -> str:
    made = copy.deepcopy(GOOD)
    made["spec"] |= {"rollout": rollout, "routing": routing}
    return yaml.safe_dump(made)


STICKY = {"sticky": {"header": "x-user-id"}}


@pytest.mark.parametrize(
    "rollout",
    [
        {"strategy": "BlueGreen"},
        {
            "strategy": "BlueGreen",
            "blueGreen": {
                "autoPromotion": False, "mirrorPercent": 5.5, "minRequests": 9, "pause": {}, "watchSeconds": 60,
                "keepOldSeconds": 0,
            },
        },
        {"strategy": "ABTest"},
        {
            "strategy": "ABTest",
            "abTest": {
                "split": 20, "minRequests": 5, "duration": "48h", "goal": "errorRate", "confidence": 0.9,
                "onSuccess": "Promote",
            },
        },
        {"strategy": "Shadow"},
        {"strategy": "Shadow", "shadow": {"mirrorPercent": 1, "duration": "1h", "onSuccess": "Promote"}},
        {"strategy": "Canary", "gates": [{"promql": 'x{model="{{model}}", version="{{candidate}}"}', "max": 1}]},
    ],
)  # fmt: skip
def test_each_strategy_has_its_own_block(rollout: dict[str, Any]) -> None:
    assert manifest.parse(of_strategy(rollout, **STICKY)).spec.rollout.strategy == rollout["strategy"]


@pytest.mark.parametrize(
    ("rollout", "field"),
    [
        ({"strategy": "BlueGreen", "blueGreen": {"split": 5}}, "blueGreen.split"),
        ({"strategy": "BlueGreen", "blueGreen": {"mirrorPercent": 101}}, "blueGreen.mirrorPercent"),
        ({"strategy": "BlueGreen", "blueGreen": {"mirrorPercent": 0.001}}, "blueGreen.mirrorPercent"),
        ({"strategy": "BlueGreen", "blueGreen": {"keepOldSeconds": -1}}, "blueGreen.keepOldSeconds"),
        ({"strategy": "BlueGreen", "blueGreen": {"pause": {"duration": "0s"}}}, "blueGreen.pause.duration"),
        ({"strategy": "BlueGreen", "shadow": {}}, "shadow"),
        ({"strategy": "ABTest", "abTest": {"split": 100}}, "abTest.split"),
        ({"strategy": "ABTest", "abTest": {"split": 0}}, "abTest.split"),
        ({"strategy": "ABTest", "abTest": {"duration": "721h"}}, "abTest.duration"),
        ({"strategy": "ABTest", "abTest": {"goal": "joy"}}, "abTest.goal"),
        ({"strategy": "ABTest", "abTest": {"onSuccess": "Promote"}}, "abTest.onSuccess"),
        ({"strategy": "ABTest", "steps": [{"weight": 50}]}, "steps"),
        ({"strategy": "Shadow", "shadow": {"mirrorPercent": 0}}, "shadow.mirrorPercent"),
        ({"strategy": "Shadow", "shadow": {"onSuccess": "Promote"}}, "shadow.onSuccess"),
        ({"strategy": "Shadow", "shadow": {"onSuccess": "Celebrate"}}, "shadow.onSuccess"),
        ({"strategy": "Shadow", "abTest": {}}, "abTest"),
    ],
)
def test_a_strategy_refuses_the_others_fields_by_name(rollout: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        manifest.parse(of_strategy(rollout, **STICKY))
    assert caught.value.field == f"spec.rollout.{field}", caught.value.message


def test_an_ab_test_needs_sticky_callers() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        manifest.parse(of_strategy({"strategy": "ABTest"}))
    assert caught.value.field == "spec.routing.sticky"


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "a: [", "- 1", "x" * 70_000, "[" * 60_000, "a: &a [1]\nb: *a", "a: .nan", "a: 1\na: 2", "? [1]\n: 2",
        "a: 2020-01-01", "!!python/object/apply:os.system ['true']", "\x00", "a: " + "9" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        manifest.parse(text)


@given(st.text(max_size=200))
def test_any_text_is_a_manifest_or_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        manifest.parse(text)


SAMPLES = sorted((Path(__file__).parents[3] / "deploy/samples/flights/manifests").rglob("*.yaml"))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_the_samples_are_right(path: Path) -> None:
    assert manifest.parse(path.read_text()).metadata.name == "flight-delay"


def test_there_is_a_sample_of_every_strategy() -> None:
    found = {manifest.parse(path.read_text()).spec.rollout.strategy for path in SAMPLES}
    assert found == {"Canary", "BlueGreen", "ABTest", "Shadow"}
