"""The rule language against a real CEL implementation, and what it refuses."""

import contextlib

import pytest

# The extension module itself: xds-protos puts an empty `cel/__init__.py` over the package's own, so `cel.evaluate` may not be there.
from cel import cel
from hypothesis import given
from hypothesis import strategies as st
from millrace_kit.cel_nodes import Test, evaluate
from millrace_kit.cel_rules import MAX_ATTRIBUTES, check_rule
from millrace_kit.errors import InvalidArgumentError

Test.__test__ = False  # a node of the language, not a test

HEADERS = st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["x", "xy", "yx", ""]), max_size=2)
NAME = st.sampled_from(["a", "b"])
TEXT = st.sampled_from(["x", "y", "xy", ""])
NUMBER = st.sampled_from(["1", "-1", "2", "2.0", "1.5", "1e1", ".5"])
INPUTS = st.dictionaries(
    NAME, st.sampled_from(["x", "xy", "1", "", "true", 1, 2, -1, 1.0, 2.5, 10, True, False]), max_size=2
)
FEATURES = st.dictionaries(NAME, st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0, 10.0]), max_size=2)
METHODS = ("startsWith", "endsWith", "contains")


@st.composite
def requests(draw):
    """A call by V2 has neither inputs nor features."""
    attributes = draw(st.sampled_from([{}, {"inputs": draw(INPUTS), "features": draw(FEATURES)}]))
    return draw(HEADERS), attributes


@st.composite
def leaf(draw):
    name, text = draw(NAME), draw(TEXT)
    header = f"request.headers['{name}']"
    forms = [
        f"{header} == '{text}'", f"'{text}' != {header}", f"{header} in ['{text}', 'xy']", f"'{name}' in request.headers",
        f"{header}.startsWith('{text}')", f'{header}.endsWith("{text}")', f"{header}.contains('{text}')",
        f"{header}.matches('^{text}.*$')", "true", "false",
    ]  # fmt: skip
    number, order = draw(NUMBER), draw(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]))
    found, feature = f"request.inputs['{name}']", f"features['{name}']"
    forms += [
        f"{found} == '{text}'", f"'{text}' != {found}", f"{found} in ['{text}', 'xy']", f"{found} in [{number}, 2]",
        f"{found} == true", f"{found} != false", f"{found} in [true]", f"{found} {order} {number}",
        f"{number} {order} {found}", f"{found}.{draw(st.sampled_from(METHODS))}('{text}')", f"'{name}' in request.inputs",
        f"{feature} {order} {number}", f"{number} {order} {feature}", f"{feature} in [{number}, 2.0]",
        f"'{name}' in features",
    ]  # fmt: skip
    return draw(st.sampled_from(forms))


RULES = st.recursive(
    leaf(),
    lambda inner: st.one_of(
        st.builds(lambda a, b: f"({a}) && ({b})", inner, inner),
        st.builds(lambda a, b: f"{a} || ({b})", inner, inner),
        st.builds(lambda a: f"!({a})", inner),
    ),
    max_leaves=6,
)


def meaning(rule, headers, attributes):
    """What CEL says; None for its error, here of something absent or of another type. Any other error is no answer and fails the test."""
    request = {"headers": headers} | {k: v for k, v in attributes.items() if k == "inputs"}
    try:
        return cel.evaluate(rule, {"request": request} | {k: v for k, v in attributes.items() if k == "features"})
    except KeyError as error:
        if error.args[0] in headers and attributes and all(error.args[0] in names for names in attributes.values()):
            raise
    except TypeError as error:
        if "No such overload" not in str(error):
            raise
    except RuntimeError as error:
        # So it calls a method of a text on something else, and a variable that is not there.
        known = METHODS if attributes else (*METHODS, "features")
        if not any(f"Undefined variable or function: '{name}'" in str(error) for name in known):
            raise
    return None


@given(RULES, requests())
def test_means_what_cel_means(rule, request):
    headers, attributes = request
    assert evaluate(check_rule(rule, "when"), headers, attributes) is meaning(rule, headers, attributes)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("", "must not be empty"),
        ("request.headers['a']", "neither true nor false"),
        ("request.path == 'x'", "expected 'headers' or 'inputs', found 'path' at character 9"),
        ("request.headers['a'] == 3", "compares a header with text, found a number at character 25"),
        ("request.headers['a'] in ['x', true]", "compares a header with text, found a bool at character 31"),
        ("features['a'] == 'x'", "compares a feature with numbers, found a text at character 18"),
        ("features['a'] == true", "compares a feature with numbers, found a bool at character 18"),
        ("features['a'].contains('x')", "a feature is a number at character 15"),
        ("request.inputs['a'].matches('x+')", "unexpected .matches"),
        ("request.inputs['a'] < 'x'", "'<' compares numbers, found a text at character 23"),
        ("true && true > request.inputs['a']", "'>' compares numbers, found a bool at character 9"),
        ("request.inputs['a'] in [1, 'x']", "compares with one type, found a text at character 28"),
        ("request.inputs['a'] == request.inputs['b']", "with a literal"),
        ("request.inputs['a'] == 1 - 1", "unexpected '-'"),
        ("request.inputs['a'] == 3u", "unexpected '3'"),
        ("request.inputs['a'] == 9223372036854775808", "64 bits"),
        ("request.inputs['a'] == 1e999", "too large"),
        ("request.inputs[''] == 1", "a name in request.inputs has 1 to 256 characters"),
        ("request.inputs", "neither true nor false"),
        ("features['a']", "neither true nor false"),
        ("request.inputs['a'] < 3 < 4", "do not chain"),
        (" || ".join(["features['a'] > 1"] * (MAX_ATTRIBUTES + 1)), "more than 16 tests of inputs and features"),
        ("request.headers['a'] == request.headers['b']", "compares a header, an input or a feature with a literal"),
        ("request.headers['a'] == ", "unexpected the end"),
        ("'a' == 'b'", "compares a header"),
        ("request.headers['a'] == 'b' == 'c'", "do not chain"),
        ("request.headers['a'].size('b')", "unexpected .size"),
        ("request.headers['a'].matches('(?=b)')", "RE2"),
        ("request.headers['a'].matches('(')", "bad regular expression"),
        ("request.headers['a b'] == 'c'", "is no header name"),
        ("size(request.headers['a']) > 2", "unexpected 'size'"),
        ("true && request.headers['a']", "neither true nor false"),
        ("(" * 40 + "true" + ")" * 40, "nested deeper"),
        ("!" * 40 + "true", "nested deeper"),
        ("true " * 500, "longer than"),
    ],
)
def test_refuses(rule, problem):
    with pytest.raises(InvalidArgumentError) as caught:
        check_rule(rule, "rules[0].when")
    assert caught.value.message.startswith("rules[0].when: ")
    assert problem in caught.value.message


@given(st.text(alphabet="request.headers.inputs features['a']=!<>&|()in\\\"x 1.-,", max_size=60))
def test_any_text_is_parsed_or_refused(text):
    with contextlib.suppress(InvalidArgumentError):
        check_rule(text, "when")
