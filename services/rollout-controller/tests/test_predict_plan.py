"""What a version declares for Predict gets from the registry into the route, or the version is refused."""

import pytest
from millrace_api.registry.v1 import registry_pb2
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller import convert
from millrace_rollout_controller.hub import Table
from millrace_rollout_controller.manifest import Routing, Spec
from millrace_rollout_controller.routing import wanted_route
from millrace_rollout_controller.state import Arm, Status

PLAN = (
    '{"defaults": {"age": 30}, "post": [{"sigmoid": {}}, {"threshold": {"value": 0.5}}], "cache": {"maxAgeMs": "500"}}'
)


def version(declared: str) -> registry_pb2.ModelVersion:
    return registry_pb2.ModelVersion(
        model="churn", version="1.0.0", digest="a" * 64, tags={"millrace.predict": declared} if declared else {}
    )


def test_the_plan_of_a_version_is_in_its_arm() -> None:
    ref = convert.version_ref(version(PLAN), registry_pb2.Model(name="churn"))
    status = Status(stable=Arm(ref=ref, endpoints=("127.0.0.1:8001",)))
    route = wanted_route(Spec(model="churn", version="1.0.0", routing=Routing()), status, candidate_ready=False)
    assert route is not None
    (arm,) = convert.routes(Table(1, (route,))).models[0].arms
    assert dict(arm.predict.defaults) == {"age": 30.0}
    assert [step.WhichOneof("step") for step in arm.predict.post] == ["sigmoid", "threshold"]
    assert arm.predict.cache.max_age_ms == 500
    plain = convert.version_ref(version(""), registry_pb2.Model(name="churn"))
    assert (
        not convert.routes(
            Table(
                1, (route.model_copy(update={"arms": (route.arms[0].model_copy(update={"predict": plain.predict}),)}),)
            )
        )
        .models[0]
        .arms[0]
        .HasField("predict")
    )


def test_rules_of_values_are_in_the_arm_and_no_other_signature() -> None:
    with_rules = version("")
    with_rules.signature.feature_names.append("age")
    with_rules.signature.inputs.add(name="x", datatype="FP64", shape=[1, -1])
    plain = convert.version_ref(with_rules, registry_pb2.Model(name="churn"))
    with_rules.signature.rules.features.add(name="age", min=0)
    ref = convert.version_ref(with_rules, registry_pb2.Model(name="churn"))
    assert ref.signature == plain.signature
    status = Status(stable=Arm(ref=ref, endpoints=("127.0.0.1:8001",)))
    route = wanted_route(Spec(model="churn", version="1.0.0", routing=Routing()), status, candidate_ready=False)
    assert route is not None
    (made,) = convert.routes(Table(1, (route,))).models
    assert (made.input_datatype, list(made.input_shape)) == ("FP64", [1, -1])
    assert made.arms[0].rules == with_rules.signature.rules

    with_rules.signature.rules.features[0].name = "gae"
    with pytest.raises(InvalidArgumentError, match=r"signature\.rules"):
        convert.version_ref(with_rules, registry_pb2.Model(name="churn"))


def test_a_version_declares_the_definitions_it_was_trained_with() -> None:
    declared = version(f'{{"definitionsHash": "{"d" * 64}"}}')
    ref = convert.version_ref(declared, registry_pb2.Model(name="churn"))
    assert ref.definitions == "d" * 64
    assert not convert.version_ref(version(PLAN), registry_pb2.Model(name="churn")).definitions


@pytest.mark.parametrize("wrong", ["no JSON", '{"defualts": {}}', '{"post": [{"labels": {"names": ["x"]}}]}'])
def test_a_wrong_plan_refuses_its_version(wrong: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"millrace\.predict"):
        convert.version_ref(version(wrong), registry_pb2.Model(name="churn"))
