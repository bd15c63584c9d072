"""A checked CEL rule as a predicate Envoy evaluates on request headers.

Envoy's CEL matcher is not allowed in route tables (1.40: "Route table can only match on request headers"), its tree of header
predicates is. A predicate knows only yes and no, CEL also knows "error"; so a rule is translated twice, into when it is true and
when it is false, and an error is when neither holds. What a rule asks of inputs and features is answered by Predict, in a header.
"""

import re
from typing import TypeAlias

from envoy.type.matcher.v3 import http_inputs_pb2
from millrace_kit.cel_nodes import And, AttributePresent, AttributeTest, Constant, Node, Not, Or, Present, Test
from xds.core.v3 import extension_pb2
from xds.type.matcher.v3 import matcher_pb2, regex_pb2, string_pb2

from millrace_inference_gateway.attribute_rules import OUTCOMES_HEADER, outcome_text
from millrace_inference_gateway.envoy_clusters import packed

Predicate: TypeAlias = matcher_pb2.Matcher.MatcherList.Predicate


def rule_predicate(rule: Node) -> Predicate:
    """Holds when the rule is true."""
    return _true(rule)


def header_equals(header: str, value: str) -> Predicate:
    """Holds when the header has that value."""
    return _single(header, string_pb2.StringMatcher(exact=value))


def header_matches(header: str, pattern: str) -> Predicate:
    """Holds when the whole value of the header matches (RE2)."""
    return _single(header, _regex(pattern))


def header_present(header: str) -> Predicate:
    """Holds when the header is there."""
    return _present(header)


def both(left: Predicate, right: Predicate) -> Predicate:
    """Holds when both do."""
    return Predicate(and_matcher=Predicate.PredicateList(predicate=[left, right]))


def either(left: Predicate, right: Predicate) -> Predicate:
    """Holds when one of them does."""
    return Predicate(or_matcher=Predicate.PredicateList(predicate=[left, right]))


def _no(predicate: Predicate) -> Predicate:
    return Predicate(not_matcher=predicate)


def _true(node: Node) -> Predicate:
    match node:
        case Constant(value=value):
            return _always() if value else _no(_always())
        case Present(header=header):
            return _present(header)
        case Test():
            return _test(node)
        case AttributePresent() | AttributeTest():
            return _outcome(outcome_text(node, holds=True))
        case Not(operand=operand):
            return _false(operand)
        case And(left=left, right=right):
            return both(_true(left), _true(right))
        case Or(left=left, right=right):
            return either(_true(left), _true(right))


def _false(node: Node) -> Predicate:
    match node:
        case Constant(value=value):
            return _no(_always()) if value else _always()
        case Present(header=header):
            return _no(_present(header))
        case Test(header=header):
            return both(_present(header), _no(_test(node)))
        case AttributePresent() | AttributeTest():
            return _outcome(outcome_text(node, holds=False))
        case Not(operand=operand):
            return _true(operand)
        case And(left=left, right=right):
            return either(_false(left), _false(right))
        case Or(left=left, right=right):
            return both(_false(left), _false(right))


def _outcome(text: str) -> Predicate:
    """Holds when Predict says so; nobody else can."""
    return _single(OUTCOMES_HEADER, string_pb2.StringMatcher(contains=text))


def _test(node: Test) -> Predicate:
    if not node.values:
        return _no(_always())
    found = _single(node.header, _matcher(node, node.values[0]))
    for value in node.values[1:]:
        found = either(found, _single(node.header, _matcher(node, value)))
    return found


def _matcher(node: Test, value: str) -> string_pb2.StringMatcher:
    match node.operator:
        case "equals":
            # An empty text in Envoy's matcher is no matcher at all.
            return string_pb2.StringMatcher(exact=value) if value else _regex("")
        case "startsWith":
            return _regex(f"{re.escape(value)}(?s:.*)")
        case "endsWith":
            return _regex(f"(?s:.*){re.escape(value)}")
        case "contains":
            return _regex(f"(?s:.*){re.escape(value)}(?s:.*)")
        case "matches":
            return _regex(f"(?s:.*)(?:{value})(?s:.*)")


def _present(header: str) -> Predicate:
    return _single(header, _regex("(?s:.*)"))


def _always() -> Predicate:
    """Every HTTP/2 request has a path."""
    return _present(":path")


def _regex(pattern: str) -> string_pb2.StringMatcher:
    """Matches the whole value (RE2)."""
    return string_pb2.StringMatcher(
        safe_regex=regex_pb2.RegexMatcher(google_re2=regex_pb2.RegexMatcher.GoogleRE2(), regex=pattern)
    )


def _single(header: str, matcher: string_pb2.StringMatcher) -> Predicate:
    source = http_inputs_pb2.HttpRequestHeaderMatchInput(header_name=header)
    config = extension_pb2.TypedExtensionConfig(name="header", typed_config=packed(source))
    return Predicate(single_predicate=Predicate.SinglePredicate(input=config, value_match=matcher))
