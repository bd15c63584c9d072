"""What is allowed as a value, by the signature alone."""

import math
import struct

import numpy as np
import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_api.common.v1 import common_pb2
from millrace_inference_gateway.input_tensors import vector_tensor
from millrace_inference_gateway.value_checks import Checks
from millrace_kit.errors import InvalidArgumentError

NAN, INF = math.nan, math.inf
NAMES = ("a", "b")


def checks(kind: str = "<f4", *, given: bool = False, **fields: object) -> Checks:
    rules = json_format.ParseDict(fields, common_pb2.ValueRules())
    return Checks("m", "1.0.0", rules, NAMES, np.dtype(kind), given=given)


def problem(made: Checks, a: float) -> str:
    try:
        values, findings = made.features((a, 0.0))
    except InvalidArgumentError as error:
        return error.metadata["problem"] if error.metadata["index"] == "0" else "another feature"
    assert not findings
    assert struct.pack("2d", *values) == struct.pack("2d", a, 0.0)
    return ""


RULE = {"name": "a"}


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        # A feature that was looked up and has no rule is what it always was.
        (checks(), {NAN: "", INF: "", -INF: "", 1e300: "", 1.5: ""}),
        (checks(given=True), {NAN: "", INF: "INFINITE", -INF: "INFINITE", 1e300: "OUT_OF_TYPE", 3.4e38: ""}),
        (checks("<f8", given=True), {1e300: "", INF: "INFINITE"}),
        (checks("<f2", given=True), {65_504.0: "", 65_505.0: "OUT_OF_TYPE"}),
        (checks("<i4"), {1.0: "", 1.5: "WRONG_TYPE", 2.0**31: "OUT_OF_TYPE", NAN: "MISSING", INF: "INFINITE"}),
        (checks("<i8"), {2.0**62: "", 2.0**63: "OUT_OF_TYPE", -(2.0**63): ""}),
        (checks("?"), {0.0: "", 1.0: "", 0.5: "WRONG_TYPE", 2.0: "OUT_OF_TYPE"}),
        (checks(features=[RULE]), {INF: "INFINITE", NAN: "", 1e300: "OUT_OF_TYPE"}),
        (
            checks(features=[RULE | {"min": 0, "max": 2}]),
            {0.0: "", 2.0: "", -1e-9: "BELOW_MIN", 3.0: "ABOVE_MAX", NAN: ""},
        ),
        (checks(features=[RULE | {"min": 0, "allow_infinite": True}]), {INF: "", -INF: "BELOW_MIN"}),
        (checks(features=[RULE | {"required": True}]), {NAN: "MISSING", 1.0: ""}),
        (checks(features=[RULE | {"allowed": [1, 2]}]), {1.0: "", 3.0: "NOT_ALLOWED", NAN: "", INF: "NOT_ALLOWED"}),
        (checks("<i4", features=[RULE | {"min": 0.5}]), {1.0: "", 0.0: "BELOW_MIN"}),
    ],
)
def test_features(made: Checks, wanted: dict[float, str]) -> None:
    assert {a: problem(made, a) for a in wanted} == wanted


def test_policies() -> None:
    clip = checks(features=[RULE | {"min": 0, "max": 2, "policy": "VALUE_POLICY_CLIP"}])
    for value, used in ((-5.0, 0.0), (INF, 2.0), (1e300, 2.0), (1.0, 1.0)):
        values, findings = clip.features((value, 0.0))
        assert (values, [f.clipped for f in findings]) == ((used, 0.0), [True] if value != used else [])
    half = checks(features=[RULE | {"min": 0, "policy": "VALUE_POLICY_CLIP"}])
    assert problem(half, INF) == "INFINITE"
    whole = checks("<i4", features=[RULE | {"max": 2.5, "policy": "VALUE_POLICY_CLIP"}])
    assert whole.features((9.0, 0.0))[0] == (2.0, 0.0)

    warn = checks(features=[RULE | {"max": 2, "policy": "VALUE_POLICY_WARN"}])
    values, (finding,) = warn.features((INF, 0.0))
    assert (values[0], finding.problem) == (INF, common_pb2.VALUE_PROBLEM_INFINITE)
    # What the tensor cannot hold is refused whatever the policy.
    assert problem(checks("<i4", features=[RULE | {"policy": "VALUE_POLICY_WARN"}]), NAN) == "MISSING"
    assert problem(checks(features=[RULE | {"policy": "VALUE_POLICY_WARN"}]), 1e300) == "OUT_OF_TYPE"


def given_inputs(made: Checks, **values: object) -> str:
    kinds = {float: "double_value", int: "int64_value", bool: "bool_value", str: "string_value"}
    inputs = {name: common_pb2.Value(**{kinds[type(value)]: value}) for name, value in values.items()}
    odd = [(n, v) for n, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    try:
        return " ".join(f"{f.field} {f.problem}" for f in made.inputs(inputs, odd))
    except InvalidArgumentError as error:
        return error.metadata["problem"] if error.field.startswith("inputs['") else error.field


def test_inputs() -> None:
    plain = checks()
    assert [given_inputs(plain, x=v) for v in (1.0, NAN, INF, "text")] == ["", "NAN", "INFINITE", ""]
    odd = checks(inputs=[{"name": "x", "allow_nan": True, "allow_infinite": True}])
    assert [given_inputs(odd, x=v) for v in (NAN, INF)] == ["", ""]
    bounded = checks(inputs=[{"name": "x", "min": 1, "max": 2, "required": True}])
    assert [given_inputs(bounded, x=v) for v in (1, 2.0, True, 0, 3.0, "1")] == [
        "",
        "",
        "",
        "BELOW_MIN",
        "ABOVE_MAX",
        "WRONG_TYPE",
    ]
    assert given_inputs(bounded, y=1.0) == "MISSING"
    texts = checks(inputs=[{"name": "x", "allowed_texts": ["JFK", "LGA"]}])
    assert [given_inputs(texts, x=v) for v in ("JFK", "ewr", 1)] == ["", "NOT_ALLOWED", "WRONG_TYPE"]
    warn = checks(inputs=[{"name": "x", "max": 2, "policy": "VALUE_POLICY_WARN"}])
    assert given_inputs(warn, x=3.0) == f"inputs['x'] {common_pb2.VALUE_PROBLEM_ABOVE_MAX}"
    # Of a model without a feature service the inputs are features, and may be clipped.
    features = checks(given=True, features=[RULE | {"max": 2, "policy": "VALUE_POLICY_CLIP"}])
    assert given_inputs(features, a=INF) == ""
    assert features.features((INF, 0.0))[0] == (2.0, 0.0)
    assert given_inputs(checks(given=True, features=[RULE | {"allow_nan": True}]), a=NAN) == ""


@settings(max_examples=300)
@given(
    st.floats(allow_nan=True),
    st.none() | st.floats(-1e6, 1e6),
    st.none() | st.floats(-1e6, 1e6),
    st.booleans(),
    st.booleans(),
)
def test_the_quick_look_finds_what_the_slow_one_finds(
    value: float, low: float | None, high: float | None, required: bool, infinite: bool
) -> None:
    bounds = {name: bound for name, bound in (("min", low), ("max", high)) if bound is not None}
    if len(bounds) == 2 and bounds["min"] > bounds["max"]:
        return
    made = checks(features=[RULE | bounds | {"required": required, "allow_infinite": infinite}])
    wanted = not (
        (math.isnan(value) and required)
        or (math.isinf(value) and not infinite)
        or value < bounds.get("min", -INF)
        or value > bounds.get("max", INF)
        or (math.isfinite(value) and not infinite and abs(value) > float(np.finfo("<f4").max))
    )
    assert (problem(made, value) == "") == wanted


@pytest.mark.parametrize(
    ("shape", "features", "wanted"),
    [
        ((), 3, (3,)), ((3,), 3, (3,)), ((-1,), 3, (3,)), ((1, 3), 3, (1, 3)), ((-1, 2), 6, (3, 2)), ((2,), 3, None),
        ((-1, -1), 4, None), ((-1, 2), 3, None),
    ],
)  # fmt: skip
def test_the_shape_of_the_input(shape: tuple[int, ...], features: int, wanted: tuple[int, ...] | None) -> None:
    found = vector_tensor("FP32", shape, features)
    assert (found.shape if found else None) == wanted
    assert vector_tensor("BYTES", shape, features) is None
