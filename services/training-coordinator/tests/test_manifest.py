"""Every wrong manifest is refused with the name of its field."""

import contextlib
import random

import pytest
import yaml
from millrace_kit.errors import InvalidArgumentError
from millrace_training_coordinator.manifest import Limits, parse_manifest
from millrace_training_coordinator.runs import ancestors, plan_of

LIMITS = Limits(cpus=4, memory_mib=8192, gpus=1, timeout_s=3600)


def parse(**fields):
    base = {"name": "demo", "stages": [{"name": "a", "command": ["true"]}]}
    return parse_manifest(yaml.safe_dump({**base, **fields}), LIMITS)


def stages(*extra, **first):
    return [{"name": "a", "command": ["true"], **first}, *extra]


GOOD = """
name: flight-delay
seed: 42
parameters: {train_end: 2013-07-01, rate: 1e-3, flag: yes, text: "a: b"}
stages:
  - {name: b, command: [python, b.py], depends_on: [a], distributed: {workers: 2}}
  - name: a
    command: [python, -c, "print('x')"]
    retries: 3
    timeout_s: 600
    resources: {cpus: 0.5, memory_mib: 512, gpus: 1}
    outputs: [deep/model.onnx]
    effects: true
retrain: {model: flight-delay, kinds: [PERFORMANCE, COVARIATE], cooldown_s: 86400, parameters: {train_end: "{window_end}"}}
"""


def test_a_good_manifest() -> None:
    manifest = parse_manifest(GOOD, LIMITS)
    assert [stage.name for stage in manifest.stages] == ["a", "b"]
    # Parameters are what was written.
    assert manifest.parameters == {"train_end": "2013-07-01", "rate": "1e-3", "flag": "yes", "text": "a: b"}
    a, b = manifest.stages
    assert (manifest.seed, a.retries, a.timeout_s, a.resources.cpus, a.effects, a.outputs) == (
        42, 3, 600, 0.5, True, ("deep/model.onnx",),
    )  # fmt: skip
    assert b.distributed is not None
    assert b.distributed.workers == 2
    assert manifest.retrain is not None
    assert manifest.retrain.parameters == {"train_end": "{window_end}"}


BAD = [
    ({"name": "Demo"}, "manifest_yaml.name"),
    ({"seed": "many"}, "manifest_yaml.seed"),
    ({"seed": 2**63}, "manifest_yaml.seed"),
    ({"colour": 1}, "manifest_yaml.colour"),
    ({"stages": []}, "manifest_yaml.stages"),
    ({"stages": "all"}, "manifest_yaml.stages"),
    ({"stages": [{"name": "a"}]}, "manifest_yaml.stages[0].command"),
    ({"stages": stages(command=[])}, "manifest_yaml.stages[0].command"),
    ({"stages": stages(command="true")}, "manifest_yaml.stages[0].command"),
    ({"stages": stages(command=["a\0b"])}, "manifest_yaml.stages[0].command[0]"),
    ({"stages": stages(retries=4)}, "manifest_yaml.stages[0].retries"),
    ({"stages": stages(retries=-1)}, "manifest_yaml.stages[0].retries"),
    ({"stages": stages(timeout_s=0)}, "manifest_yaml.stages[0].timeout_s"),
    ({"stages": stages(pod={"image": "a b"})}, "manifest_yaml.stages[0].pod.image"),
    ({"stages": stages(pod={"nodes": "gpu"})}, "manifest_yaml.stages[0].pod.nodes"),
    ({"stages": stages(pod={"node_selector": {"a": "b c"}})}, "manifest_yaml.stages[0].pod.node_selector.a"),
    (
        {"stages": stages(pod={"tolerations": [{"operator": "Maybe"}]})},
        "manifest_yaml.stages[0].pod.tolerations[0].operator",
    ),
    ({"stages": stages(resources={"gpu_resource": "gpu"})}, "manifest_yaml.stages[0].resources.gpu_resource"),
    (
        {"stages": stages(command=["python", "a.py"], distributed={"workers": 3, "workers_per_pod": 2})},
        "manifest_yaml.stages[0].distributed.workers_per_pod",
    ),
    ({"stages": stages(timeout_s="nan")}, "manifest_yaml.stages[0].timeout_s"),
    ({"stages": stages(timeout_s=3601)}, "manifest_yaml.stages[0].timeout_s"),
    ({"stages": stages(depends_on=["b"])}, "manifest_yaml.stages[0].depends_on[0]"),
    ({"stages": stages(depends_on=["a"])}, "manifest_yaml.stages[0].depends_on[0]"),
    ({"stages": stages({"name": "a", "command": ["true"]})}, "manifest_yaml.stages[1].name"),
    (
        {"stages": stages({"name": "b", "command": ["true"], "depends_on": ["a", "a"]})},
        "manifest_yaml.stages[1].depends_on[1]",
    ),
    ({"stages": stages(resources={"cpus": 5})}, "manifest_yaml.stages[0].resources.cpus"),
    ({"stages": stages(resources={"cpus": 0})}, "manifest_yaml.stages[0].resources.cpus"),
    ({"stages": stages(resources={"memory_mib": 9000})}, "manifest_yaml.stages[0].resources.memory_mib"),
    ({"stages": stages(resources={"gpus": 2})}, "manifest_yaml.stages[0].resources.gpus"),
    ({"stages": stages(resources={"disk": 2})}, "manifest_yaml.stages[0].resources.disk"),
    ({"stages": stages(distributed={"workers": 0})}, "manifest_yaml.stages[0].distributed.workers"),
    ({"stages": stages(distributed={"workers": 2})}, "manifest_yaml.stages[0].command[0]"),
    (
        {"stages": stages(command=["python", "-c", "x"], distributed={"workers": 2})},
        "manifest_yaml.stages[0].command",
    ),
    ({"stages": stages(command=["python", "-m"], distributed={"workers": 2})}, "manifest_yaml.stages[0].command"),
    ({"stages": stages(outputs=["../x"])}, "manifest_yaml.stages[0].outputs[0]"),
    ({"stages": stages(outputs=["x", "/x"])}, "manifest_yaml.stages[0].outputs[1]"),
    ({"stages": stages(outputs=["x", "x"])}, "manifest_yaml.stages[0].outputs[1]"),
    ({"stages": stages(effects="perhaps")}, "manifest_yaml.stages[0].effects"),
    ({"parameters": {"a": ["1"]}}, "manifest_yaml.parameters.a"),
    ({"parameters": {"a": "\0"}}, "manifest_yaml.parameters.a"),
    ({"retrain": {"model": "m", "kinds": ["WEATHER"]}}, "manifest_yaml.retrain.kinds[0]"),
    ({"retrain": {"model": "m", "kinds": []}}, "manifest_yaml.retrain.kinds"),
    ({"retrain": {"model": "m", "kinds": ["LABEL"], "parameters": {"x": "1"}}}, "manifest_yaml.retrain.parameters.x"),
    (
        {"parameters": {"x": "1"}, "retrain": {"model": "m", "kinds": ["LABEL"], "parameters": {"x": "{now}"}}},
        "manifest_yaml.retrain.parameters.x",
    ),
    ({"retrain": {"model": "m", "kinds": ["LABEL"], "cooldown_s": -1}}, "manifest_yaml.retrain.cooldown_s"),
]


@pytest.mark.parametrize(("fields", "field"), BAD, ids=[f"{n}-{field}" for n, (_f, field) in enumerate(BAD)])
def test_errors_name_the_field(fields, field) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse(**fields)
    assert caught.value.field == field


def test_a_circle_is_shown() -> None:
    loop = [{"name": n, "command": ["true"], "depends_on": [d]} for n, d in (("a", "c"), ("b", "a"), ("c", "b"))]
    with pytest.raises(InvalidArgumentError, match="in a circle: a -> c -> b -> a") as caught:
        parse(stages=[{"name": "free", "command": ["true"]}, *loop])
    assert caught.value.field == "manifest_yaml.stages[1].depends_on"


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "a: &x 1\nb: *x", "name: a\nname: b", "? [a]\n: 1", "- 1", "x", "[" * 500, "a: !!python/object:os.x {}",
        "x: " + "y" * 70_000, "\x00", "a: \x07", "a: b: c", "\ufeff", "%YAML 9.9\n---\na: 1", "a: '\\ud800'", 'name: "\\ud800"',
    ],
)  # fmt: skip
def test_no_manifest_at_all(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_manifest(text, LIMITS)
    assert caught.value.field.startswith("manifest_yaml")


def test_damaged_manifests_are_refused_or_read_but_never_crash() -> None:
    source = random.Random(1)
    alphabet = "abz0 :-[]{}&*!'\"\\\n\t#|>%@`,?\0é"
    read = 0
    for _ in range(300):
        text = list(GOOD)
        for _ in range(source.randint(1, 4)):
            text[source.randrange(len(text))] = source.choice(alphabet)
        # Only this error, or none where the damage did not matter.
        with contextlib.suppress(InvalidArgumentError):
            parse_manifest("".join(text), LIMITS)
            read += 1
    assert 0 < read < 300


def test_plans_leave_effects_out_with_all_that_need_them() -> None:
    manifest = parse(
        stages=stages(
            {"name": "register", "command": ["true"], "depends_on": ["a"], "effects": True},
            {"name": "report", "command": ["true"], "depends_on": ["register"]},
            {"name": "export", "command": ["true"], "depends_on": ["a"]},
        )
    )
    assert [stage.name for stage in plan_of(manifest, effects=False)] == ["a", "export"]
    assert ancestors(manifest, "report") == ("a", "register")
    assert ancestors(manifest, "a") == ()


def test_gpus_divide_among_pods() -> None:
    text = yaml.safe_dump({"name": "demo", "stages": stages(command=["python", "a.py"], distributed={"workers": 2})})
    one = text.replace("workers: 2", "workers: 2\n  resources: {gpus: 1}")
    assert parse_manifest(one, LIMITS).stages[0].resources.gpus == 1
    with pytest.raises(InvalidArgumentError, match=r"stages\[0\].resources.gpus.*1 GPUs do not divide among 2 pods"):
        parse_manifest(one, Limits(in_pods=True))
