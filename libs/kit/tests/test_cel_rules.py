"""The rule language against a real CEL implementation, and what it refuses."""

import contextlib

import pytest

# The extension module itself: xds-protos puts an empty `cel/__init__.py` over the package's own, so `cel.evaluate` may not be there.
from cel import cel
from hypothesis import given
from hypothesis import strategies as st
from millrace_kit.cel_rules import Test, check_rule, evaluate
from millrace_kit.errors import InvalidArgumentError

Test.__test__ = False  # a node of the language, not a test

HEADERS = st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["x", "xy", "yx", ""]), max_size=2)
NAME = st.sampled_from(["a", "b"])
TEXT = st.sampled_from(["x", "y", "xy", ""])


@st.composite
def leaf(draw):
    name, text = draw(NAME), draw(TEXT)
    header = f"request.headers['{name}']"
    forms = [
        f"{header} == '{text}'", f"'{text}' != {header}", f"{header} in ['{text}', 'xy']", f"'{name}' in request.headers",
        f"{header}.startsWith('{text}')", f'{header}.endsWith("{text}")', f"{header}.contains('{text}')",
        f"{header}.matches('^{text}.*$')", "true", "false",
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


def meaning(rule, headers):
    """What CEL says; None for its error, which here is an absent header's. Any other error is no answer and fails the test."""
    try:
        return cel.evaluate(rule, {"request": {"headers": headers}})
    except KeyError as error:
        if error.args[0] in headers:
            raise
        return None


@given(RULES, HEADERS)
def test_means_what_cel_means(rule, headers):
    assert evaluate(check_rule(rule, "when"), headers) is meaning(rule, headers)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("", "must not be empty"),
        ("request.headers['a']", "neither true nor false"),
        ("request.path == 'x'", "expected 'headers', found 'path' at character 9"),
        ("request.headers['a'] == 3", "unexpected '3'"),
        ("request.headers['a'] == request.headers['b']", "compares a header with a string"),
        ("request.headers['a'] == ", "unexpected the end"),
        ("'a' == 'b'", "compares a header"),
        ("request.headers['a'] == 'b' == 'c'", "do not chain"),
        ("request.headers['a'].size('b')", "unexpected .size"),
        ("request.headers['a'].matches('(?=b)')", "RE2"),
        ("request.headers['a'].matches('(')", "bad regular expression"),
        ("request.headers['a b'] == 'c'", "is no header name"),
        ("size(request.headers['a']) > 2", "unexpected '>'"),
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


@given(st.text(alphabet="request.headers['a']=!&|()in\\\"x ", max_size=60))
def test_any_text_is_parsed_or_refused(text):
    with contextlib.suppress(InvalidArgumentError):
        check_rule(text, "when")
