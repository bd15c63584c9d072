"""What a routing rule says, and CEL's answer to it for one request.

CEL has three outcomes: true, false and error. An absent header, input or feature is an error, so is an order between a text and a
number; an error is not a match, `!` of an error is an error, and `||` holds when one side does whatever the other is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Operator = Literal["equals", "startsWith", "endsWith", "contains", "matches", "<", "<=", ">", ">="]
Source = Literal["inputs", "features"]
Kind = Literal["text", "number", "bool"]
Value = str | bool | int | float


@dataclass(frozen=True, slots=True)
class Constant:
    """`true` or `false`."""

    value: bool


@dataclass(frozen=True, slots=True)
class Present:
    """`'header' in request.headers`; never an error."""

    header: str


@dataclass(frozen=True, slots=True)
class Test:
    """One header against literals: holds when `operator` holds for one of `values`; an error when the header is absent."""

    header: str
    operator: Operator
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AttributePresent:
    """`'name' in request.inputs` or `'name' in features`; an error where a request has neither."""

    source: Source
    name: str


@dataclass(frozen=True, slots=True)
class AttributeTest:
    """One input or feature against literals of one kind; an error when it is absent, or of another kind and `operator` is not `equals`."""

    source: Source
    name: str
    operator: Operator
    kind: Kind
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """`!`."""

    operand: "Node"


@dataclass(frozen=True, slots=True)
class And:
    """`&&`."""

    left: "Node"
    right: "Node"


@dataclass(frozen=True, slots=True)
class Or:
    """`||`."""

    left: "Node"
    right: "Node"


AttributeNode = AttributePresent | AttributeTest
Node = Constant | Present | Test | AttributePresent | AttributeTest | Not | And | Or
Attributes = Mapping[Source, Mapping[str, object]]
"""Inputs and features by name; a source that is absent is one the request does not have."""


def evaluate(node: Node, headers: Mapping[str, str], attributes: Attributes | None = None) -> bool | None:
    """What the rule says about `headers` (names in lower case) and `attributes`; None is CEL's error."""
    match node:
        case Constant(value=value):
            return value
        case Present(header=header):
            return header in headers
        case Test(header=header, operator=operator, values=values):
            found = headers.get(header)
            return None if found is None else any(_holds(operator, found, value) for value in values)
        case AttributePresent() | AttributeTest():
            return evaluate_attribute(node, (attributes or {}).get(node.source))
        case Not(operand=operand):
            inner = evaluate(operand, headers, attributes)
            return None if inner is None else not inner
        case And(left=left, right=right):
            sides = (evaluate(left, headers, attributes), evaluate(right, headers, attributes))
            return False if False in sides else (None if None in sides else True)
        case Or(left=left, right=right):
            sides = (evaluate(left, headers, attributes), evaluate(right, headers, attributes))
            return True if True in sides else (None if None in sides else False)


def evaluate_attribute(node: AttributeNode, source: Mapping[str, object] | None) -> bool | None:
    """What one test of an input or a feature says; `source` are those of the request, None where it has none."""
    if source is None:
        return None
    if isinstance(node, AttributePresent):
        return node.name in source
    if node.name not in source:
        return None
    found = source[node.name]
    same = kind_of(found) == node.kind
    if node.operator == "equals":
        return same and found in node.values
    return any(_holds(node.operator, found, value) for value in node.values) if same else None


def attribute_nodes(node: Node) -> list[AttributeNode]:
    """The tests of inputs and features in a rule, from left to right."""
    match node:
        case AttributePresent() | AttributeTest():
            return [node]
        case Not(operand=operand):
            return attribute_nodes(operand)
        case And(left=left, right=right) | Or(left=left, right=right):
            return [*attribute_nodes(left), *attribute_nodes(right)]
        case _:
            return []


def kind_of(value: object) -> Kind | None:
    """CEL's kind of a value as far as literals have it; numbers are one kind, as CEL compares them."""
    match value:
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case str():
            return "text"
        case _:
            return None


def _holds(operator: Operator, found: object, value: Value) -> bool:
    match operator, found, value:
        case "equals", _, _:
            return found == value
        case "startsWith", str(text), str(literal):
            return text.startswith(literal)
        case "endsWith", str(text), str(literal):
            return text.endswith(literal)
        case "contains", str(text), str(literal):
            return literal in text
        case "matches", str(text), str(literal):
            return re.search(literal, text) is not None
        case "<", (int() | float()) as number, (int() | float()) as bound:
            return number < bound
        case "<=", (int() | float()) as number, (int() | float()) as bound:
            return number <= bound
        case ">", (int() | float()) as number, (int() | float()) as bound:
            return number > bound
        case ">=", (int() | float()) as number, (int() | float()) as bound:
            return number >= bound
    raise TypeError(f"{operator} does not compare {type(found).__name__} with {type(value).__name__}")
