"""Rules over inputs and features: answered by Predict, put into force by Envoy."""

import math

import pytest
from gateway import CANDIDATE, MODEL, arm, gateway, route
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_api.common.v1 import common_pb2
from millrace_api.prediction.v1 import prediction_pb2
from millrace_api.rollout.v1 import rollout_pb2
from millrace_inference_gateway.attribute_rules import OUTCOMES_HEADER, attribute_rules, outcome_text
from millrace_inference_gateway.envoy_rules import rule_predicate
from millrace_inference_gateway.result_cache import only_arm
from millrace_inference_gateway.routes import check_routes
from millrace_inference_gateway.upstream import passed_on
from millrace_kit.cel_nodes import attribute_nodes, evaluate
from millrace_kit.cel_rules import check_rule
from test_gateway import infer, two_versions

Value = common_pb2.Value
PREMIUM = "request.inputs['user_type'] == 'premium'"


def rules_of(*expressions, names=("a", "b")):
    return attribute_rules([check_rule(one, "when") for one in expressions], names)


def value(plain):
    kinds = {str: "string_value", bool: "bool_value", int: "int64_value", float: "double_value"}
    return Value(**{kinds[type(plain)]: plain})


LEAVES = [
    PREMIUM, "request.inputs['n'] >= 2", "request.inputs['n'] == 1.0", "request.inputs['vip'] == true",
    "request.inputs['user_type'] in ['a', 'b']", "'n' in request.inputs", "features['a'] > 0.5", "features['b'] != 0",
    "'b' in features", "features['unknown'] > 0", "request.headers['h'] == 'x'", "true",
]  # fmt: skip
RULES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        st.builds("({}) && ({})".format, inner, inner),
        st.builds("({}) || ({})".format, inner, inner),
        st.builds("!({})".format, inner),
    ),
    max_leaves=5,
)
GIVEN = st.dictionaries(
    st.sampled_from(["user_type", "n", "vip"]), st.sampled_from(["premium", "a", "", 1, 2, 3.5, -1.0, True, False])
)
VECTOR = st.tuples(*[st.sampled_from([math.nan, 0.0, 0.5, 1.0])] * 2)
HEADERS = st.sampled_from([{}, {"h": "x"}, {"h": "y"}])


def holds(predicate, headers):
    """A header predicate as Envoy reads it."""
    match predicate.WhichOneof("match_type"):
        case "and_matcher":
            return all(holds(one, headers) for one in predicate.and_matcher.predicate)
        case "or_matcher":
            return any(holds(one, headers) for one in predicate.or_matcher.predicate)
        case "not_matcher":
            return not holds(predicate.not_matcher, headers)
    single = predicate.single_predicate
    name = next(
        known for known in (*headers, OUTCOMES_HEADER, "h") if known.encode() in single.input.typed_config.value
    )
    wanted = single.value_match
    if name not in headers:
        return False
    if wanted.contains:
        return wanted.contains in headers[name]
    return headers[name] == wanted.exact if wanted.exact else True


@settings(max_examples=60)
@given(RULES, GIVEN, VECTOR, HEADERS, st.booleans())
def test_envoys_predicate_means_what_the_rule_means(rule, inputs, vector, headers, by_predict):
    node = check_rule(rule, "when")
    features = {name: number for name, number in zip("ab", vector, strict=True) if not math.isnan(number)}
    attributes = {"inputs": inputs, "features": features} if by_predict else {}
    sent = {":path": "/", **headers}
    if by_predict:
        messages = {name: value(plain) for name, plain in inputs.items()}
        found = attribute_rules([node], ("a", "b")).with_outcomes({}, messages, vector)
        sent |= {name.decode(): text.decode() for name, text in found.items()}
    assert holds(rule_predicate(node), sent) is (evaluate(node, headers, attributes) is True)


def test_outcomes_say_what_is_known() -> None:
    rules = rules_of(f"{PREMIUM} && features['b'] > 1", "request.inputs['n'] < 3", PREMIUM)
    premium, feature, number = (node for node, _, _ in rules.tests)
    nan = math.nan
    assert rules.outcomes({}, (0.0, nan)) == b""
    assert rules.outcomes({"user_type": value("premium")}, (0.0, nan)).decode() == outcome_text(premium, holds=True)
    # An order between a text and a number is an error, as is what is not there.
    assert rules.outcomes({"n": value("3")}, (0.0, 1.0)).decode() == outcome_text(feature, holds=False)
    assert rules.outcomes({"n": value(2)}, (0.0, nan)).decode() == outcome_text(number, holds=True)
    when = Timestamp(seconds=1)
    assert rules.outcomes({"user_type": Value(timestamp_value=when)}, (0.0, nan)).decode() == outcome_text(
        premium, holds=False
    )
    assert rules_of("request.headers['a'] == 'b'").with_outcomes({b"x-a": b"b"}, {"a": value("b")}, (1.0, 2.0)) == {
        b"x-a": b"b"
    }


@pytest.mark.parametrize(
    ("one", "other"), [("== 1", "== true"), ("== 1", "== '1'"), ("< 1", "<= 1"), ("in ['a', 'b']", "in ['b', 'a']")]
)
def test_tests_that_differ_have_marks_that_differ(one: str, other: str) -> None:
    nodes = [attribute_nodes(check_rule(f"request.inputs['a'] {text}", "when"))[0] for text in (one, other)]
    assert len({outcome_text(node, holds=True) for node in nodes}) == 2


def test_answers_are_not_given_again_while_rules_read_attributes() -> None:
    message = route(arm("1.0.0"), arm("1.1.0", weight=0, role=CANDIDATE))
    message.rules.add(when=PREMIUM, to=CANDIDATE)
    made = check_routes(rollout_pb2.Routes(models=[message])).routes[MODEL]
    assert (only_arm(made), len(made.attributes.tests)) == (None, 1)
    # Without a candidate nothing is asked, and one version answers all.
    alone = route(arm("1.0.0"))
    alone.rules.add(when=PREMIUM, to=CANDIDATE)
    made = check_routes(rollout_pb2.Routes(models=[alone])).routes[MODEL]
    assert (only_arm(made) is not None, made.attributes.tests) == (True, ())


def test_outcomes_are_not_taken_from_callers() -> None:
    assert passed_on({OUTCOMES_HEADER.encode(): b"1", b"x-user-type": b"a"}) == {b"x-user-type": b"a"}


async def test_a_prediction_goes_where_its_inputs_and_features_say() -> None:
    async with gateway() as (g, rollout), two_versions() as (at_first, at_second):
        new, old = "1.1.0", "1.0.0"
        arms = [arm(old, at_first, weight=100), arm(new, at_second, weight=0, role=CANDIDATE)]

        async def rules(*expressions: str) -> None:
            made = route(*arms)
            for one in expressions:
                made.rules.add(when=one, to=CANDIDATE)
            await rollout.in_force(rollout.set(made))

        def row(**inputs: object) -> prediction_pb2.PredictRow:
            return prediction_pb2.PredictRow(
                inputs={name: value(one) for name, one in inputs.items()}, sticky_key="somebody"
            )

        async def version(*metadata: tuple[str, str], **inputs: object) -> str:
            request = prediction_pb2.PredictRequest(model=MODEL, inputs=row(**inputs).inputs)
            return (await g.predictions.Predict(request, metadata=metadata, timeout=10)).version

        await rules(PREMIUM, "features['b'] > 0.5 && request.headers['x-hub'] == 'JFK'")
        premium, basic = {"a": 1.0, "user_type": "premium"}, {"a": 1.0, "user_type": "basic"}
        assert [await version(**premium), await version(**basic), await version(a=1.0)] == [new, old, old]
        assert await version(("x-hub", "JFK"), a=1.0, b=0.75) == new
        assert await version(("x-hub", "LAX"), a=1.0, b=0.75) == old
        assert await version(("x-hub", "JFK"), a=1.0, b=0.25) == old
        assert await version(("x-hub", "JFK"), a=1.0) == old

        # Rows of one caller, who is on one side of the split, share model calls as far as the rules say the same of them.
        rows = [row(**premium), row(**basic), row(**premium), row(a=2.0)]
        batch = await g.predictions.PredictBatch(prediction_pb2.PredictBatchRequest(model=MODEL, rows=rows), timeout=10)
        assert [one.response.version for one in batch.results] == [new, old, new, old]
        ids = [one.response.prediction_id.partition(".")[0] for one in batch.results]
        assert ids[0] == ids[2] != ids[1]

        # Nobody but Predict says what was found.
        (node,) = attribute_nodes(check_rule(PREMIUM, "when"))
        forged = (OUTCOMES_HEADER, outcome_text(node, holds=True))
        assert await version(forged, **basic) == old
        name = {"x_millrace_model": MODEL}
        assert await infer(g.public_channel, **name, **{OUTCOMES_HEADER.replace("-", "_"): forged[1]}) == old

        # A call by V2 has neither inputs nor features, which is an error and no match either way.
        await rules(f"!({PREMIUM})", "!('user_type' in request.inputs)")
        assert await infer(g.public_channel, **name) == old
        assert [await version(**premium), await version(**basic), await version(a=1.0)] == [old, new, new]
        # By weight where no rule holds.
        arms[:] = [arm(old, at_first, weight=0), arm(new, at_second, weight=100, role=CANDIDATE)]
        await rules("request.inputs['n'] < 0")
        assert [await version(a=1.0, n=3), await infer(g.public_channel, **name)] == [new, new]
