"""CEL (cel.dev) expressions over a request: parse and type-check the part of the language that routes may use.

The same check runs where a manifest is accepted and where a route is put in force; `cel_nodes` has what is made of it, and its meaning.

Accepted: `request.headers['name']`, `request.inputs['name']` and `features['name']`, compared by `==` and `!=`, `in ['a', 'b']`, and
`'name' in request.headers` (`request.inputs`, `features`). Headers are compared with strings, features with numbers, inputs with strings,
numbers or `true` and `false`; numbers also by `<`, `<=`, `>` and `>=`. Headers and inputs have `.startsWith('a')`, `.endsWith('a')` and
`.contains('a')`, headers also `.matches('regex')`. Then `true`, `false`, `&&`, `||`, `!` and parentheses.
Everything else is refused with the position of the problem.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from millrace_kit.cel_nodes import (
    And,
    AttributePresent,
    AttributeTest,
    Constant,
    Kind,
    Node,
    Not,
    Operator,
    Or,
    Present,
    Source,
    Test,
    Value,
    kind_of,
)
from millrace_kit.errors import InvalidArgumentError

MAX_LENGTH = 2048
MAX_DEPTH = 32
MAX_ATTRIBUTES = 16
"""Tests of inputs and features in one rule; their outcomes travel with a call."""
MAX_NAME = 256
"""Length of the name of an input or a feature."""

_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<string>'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\")|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<number>-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?![\w.]))"
    r"|(?P<mark>&&|\|\||==|!=|<=|>=|[<>!()\[\].,])"
)
_ESCAPES = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "r": "\r", "t": "\t", "`": "`", "?": "?"}
_METHODS: dict[str, Operator] = {
    "startsWith": "startsWith", "endsWith": "endsWith", "contains": "contains", "matches": "matches",
}  # fmt: skip
_HEADER = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ORDER: dict[str, Operator] = {"<": "<", "<=": "<=", ">": ">", ">=": ">="}
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_RELATIONS = ("==", "!=", "in", *_ORDER)


def check_rule(expression: str, field: str) -> Node:
    """The meaning of `expression`; header names are in lower case.

    Raises:
        InvalidArgumentError: it is too long, is no CEL, or uses something outside the accepted part; names `field`.
    """
    if not expression.strip():
        raise InvalidArgumentError(field, "must not be empty", "INVALID_RULE")
    if len(expression) > MAX_LENGTH:
        raise InvalidArgumentError(field, f"is longer than {MAX_LENGTH} characters", "INVALID_RULE")
    try:
        return _Parser(expression).parse()
    except _ParseError as error:
        raise InvalidArgumentError(field, str(error), "INVALID_RULE") from None


class _ParseError(Exception):
    def __init__(self, problem: str, position: int) -> None:
        super().__init__(f"{problem} at character {position + 1}")


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int

    @property
    def shown(self) -> str:
        return repr(self.text) if self.text else "the end"


@dataclass(frozen=True, slots=True)
class _Map:
    """`request.headers`, `request.inputs` or `features`."""

    source: Source | None
    """None for headers."""

    def __str__(self) -> str:
        return "features" if self.source == "features" else f"request.{self.source or 'headers'}"


@dataclass(frozen=True, slots=True)
class _Member:
    """One entry of a map."""

    map: _Map
    name: str


@dataclass(frozen=True, slots=True)
class _Literal:
    value: Value
    position: int


@dataclass(frozen=True, slots=True)
class _List:
    items: tuple[_Literal, ...]


_NODES = (Constant, Present, Test, AttributePresent, AttributeTest, Not, And, Or)
# What a relation's side may be, before it is known whether it is a test by itself.
_Operand = Node | _Map | _Member | _Literal | _List


def _tokens(expression: str) -> list[_Token]:
    found: list[_Token] = []
    position = 0
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if match is None:
            raise _ParseError(f"unexpected {expression[position]!r}", position)
        if match.lastgroup != "space":
            found.append(_Token(str(match.lastgroup), match[0], position))
        position = match.end()
    found.append(_Token("end", "", position))
    return found


def _unquote(token: _Token) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[1] not in _ESCAPES:
            raise _ParseError(f"unknown escape \\{match[1]}", token.position)
        return _ESCAPES[match[1]]

    return re.sub(r"\\(.)", replace, token.text[1:-1])


class _Parser:
    """Recursive descent over CEL's precedence: `||`, `&&`, relations, `!`, member, primary."""

    def __init__(self, expression: str) -> None:
        self._tokens = _tokens(expression)
        self._index = 0
        self._depth = 0
        self._attributes = 0

    @property
    def _now(self) -> _Token:
        return self._tokens[self._index]

    def _is(self, text: str) -> bool:
        return self._now.text == text and self._now.kind != "string"

    def _take(self, text: str = "") -> _Token:
        token = self._now
        if text and not self._is(text):
            raise _ParseError(f"expected {text!r}, found {token.shown}", token.position)
        self._index += 1
        return token

    def parse(self) -> Node:
        node = self._rule(self._or)
        if self._now.kind != "end":
            raise _ParseError(f"unexpected {self._now.shown}", self._now.position)
        return node

    def _rule(self, part: Callable[[], _Operand]) -> Node:
        """A part that must be true or false by itself."""
        position = self._now.position
        found = part()
        if isinstance(found, _NODES):
            return found
        raise _ParseError("is neither true nor false", position)

    def _text(self) -> str:
        token = self._take()
        if token.kind != "string":
            raise _ParseError(f"expected a string in quotes, found {token.shown}", token.position)
        return _unquote(token)

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _ParseError(f"nested deeper than {MAX_DEPTH}", self._now.position)

    def _or(self) -> _Operand:
        self._deeper()
        position = self._now.position
        found = self._and()
        while self._is("||"):
            left = self._as_rule(found, position)
            self._take()
            found = Or(left, self._rule(self._and))
        self._depth -= 1
        return found

    def _and(self) -> _Operand:
        position = self._now.position
        found = self._relation()
        while self._is("&&"):
            left = self._as_rule(found, position)
            self._take()
            found = And(left, self._rule(self._relation))
        return found

    def _as_rule(self, found: _Operand, position: int) -> Node:
        if isinstance(found, _NODES):
            return found
        raise _ParseError("is neither true nor false", position)

    def _relation(self) -> _Operand:
        position = self._now.position
        left = self._unary()
        if not any(self._is(mark) for mark in _RELATIONS):
            return left
        mark, after = self._take().text, self._now.position
        found = self._counted(
            _relate(mark, _as_literal(left, position), _as_literal(self._unary(), after), position), position
        )
        if any(self._is(mark) for mark in _RELATIONS):
            raise _ParseError("relations do not chain; use &&", self._now.position)
        return found

    def _counted(self, node: Node, position: int) -> Node:
        inner = node.operand if isinstance(node, Not) else node
        self._attributes += isinstance(inner, (AttributePresent, AttributeTest))
        if self._attributes > MAX_ATTRIBUTES:
            raise _ParseError(f"more than {MAX_ATTRIBUTES} tests of inputs and features", position)
        return node

    def _unary(self) -> _Operand:
        if not self._is("!"):
            return self._member()
        self._deeper()
        self._take()
        found = Not(self._rule(self._unary))
        self._depth -= 1
        return found

    def _member(self) -> _Operand:
        found = self._primary()
        while self._is(".") or self._is("["):
            position = self._now.position
            if self._take().text == "[":
                name = self._text()
                self._take("]")
                if not isinstance(found, _Map):
                    raise _ParseError("only request.headers, request.inputs and features can be indexed", position)
                found = _Member(found, _name(found, name, position))
                continue
            found = self._method(found)
        return found

    def _method(self, found: _Operand) -> Node:
        method = self._take()
        operator = _METHODS.get(method.text) if method.kind == "name" else None
        if operator is None or not isinstance(found, _Member):
            known = ", ".join(sorted(_METHODS))
            raise _ParseError(f"unexpected .{method.text}; a header has {known}", method.position)
        source = found.map.source
        if source == "features":
            raise _ParseError(f"unexpected .{method.text}; a feature is a number", method.position)
        if source is not None and operator == "matches":
            # Python's engine would run on texts that clients choose; it has no bound on its time.
            raise _ParseError("unexpected .matches; an input has contains, endsWith, startsWith", method.position)
        self._take("(")
        position = self._now.position
        value = self._text()
        self._take(")")
        if operator == "matches":
            _check_regex(value, position)
        if source is None:
            return Test(found.name, operator, (value,))
        return self._counted(AttributeTest(source, found.name, operator, "text", (value,)), method.position)

    def _primary(self) -> _Operand:
        token = self._take()
        if token.kind in {"string", "number"}:
            return _literal(token)
        match token.text:
            case "(":
                found = self._or()
                self._take(")")
                return found
            case "[":
                return self._list()
            case "true" | "false":
                return Constant(token.text == "true")
            case "features":
                return _Map("features")
            case "request":
                self._take(".")
                if self._is("inputs"):
                    self._take()
                    return _Map("inputs")
                if not self._is("headers"):
                    raise _ParseError(f"expected 'headers' or 'inputs', found {self._now.shown}", self._now.position)
                self._take()
                return _Map(None)
        known = "request.headers, request.inputs and features are"
        raise _ParseError(f"unexpected {token.shown}; only {known} known here", token.position)

    def _list(self) -> _List:
        items: list[_Literal] = []
        while not self._is("]"):
            token = self._take()
            if token.kind not in {"string", "number"} and token.text not in {"true", "false"}:
                raise _ParseError(f"expected a literal, found {token.shown}", token.position)
            items.append(_literal(token))
            if not self._is("]"):
                self._take(",")
        self._take("]")
        return _List(tuple(items))


def _literal(token: _Token) -> _Literal:
    if token.kind == "string":
        return _Literal(_unquote(token), token.position)
    if token.kind == "name":
        return _Literal(token.text == "true", token.position)
    whole = re.fullmatch(r"-?[0-9]+", token.text)
    value = int(token.text) if whole else float(token.text)
    if whole and not -(2**63) <= value < 2**63:
        raise _ParseError("is no whole number of 64 bits; write it with a decimal point", token.position)
    if not math.isfinite(value):
        raise _ParseError("is too large a number", token.position)
    return _Literal(value, token.position)


def _as_literal(found: _Operand, position: int) -> _Operand:
    return _Literal(found.value, position) if isinstance(found, Constant) else found


def _name(of: _Map, name: str, position: int) -> str:
    if of.source is None:
        if not _HEADER.fullmatch(name):
            raise _ParseError(f"{name!r} is no header name", position)
        return name.lower()
    if not 1 <= len(name) <= MAX_NAME:
        raise _ParseError(f"a name in {of} has 1 to {MAX_NAME} characters", position)
    return name


def _relate(mark: str, left: _Operand, right: _Operand, position: int) -> Node:
    match mark, left, right:
        case "in", _Literal(value=str(value)), _Map() as entries:
            name = _name(entries, value, position)
            return Present(name) if entries.source is None else AttributePresent(entries.source, name)
        case "in", _Member() as member, _List(items=items):
            return _test(member, "equals", mark, items)
        case "==" | "!=", _Member() as member, _Literal() as literal:
            test = _test(member, "equals", mark, (literal,))
        case "==" | "!=", _Literal() as literal, _Member() as member:
            test = _test(member, "equals", mark, (literal,))
        case "<" | "<=" | ">" | ">=", _Member() as member, _Literal() as literal:
            return _test(member, _ORDER[mark], mark, (literal,))
        case "<" | "<=" | ">" | ">=", _Literal() as literal, _Member() as member:
            return _test(member, _ORDER[_FLIPPED[mark]], mark, (literal,))
        case _:
            known = "compares a header, an input or a feature with a literal, or looks into a list of literals"
            raise _ParseError(f"{mark!r} {known}", position)
    return Not(test) if mark == "!=" else test


def _test(member: _Member, operator: Operator, mark: str, literals: tuple[_Literal, ...]) -> Test | AttributeTest:
    source = member.map.source
    kind: Kind = "number" if source == "features" else "text"
    if source == "inputs" and literals:
        kind = _kind(literals[0])
    whose = {None: "a header with text", "features": "a feature with numbers", "inputs": "with one type"}[source]
    for literal in literals:
        if (found := _kind(literal)) != kind:
            raise _ParseError(f"{mark!r} compares {whose}, found a {found}", literal.position)
        if operator in _ORDER and kind != "number":
            raise _ParseError(f"{mark!r} compares numbers, found a {found}", literal.position)
    values = tuple(literal.value for literal in literals)
    if source is None:
        return Test(member.name, operator, tuple(str(value) for value in values))
    return AttributeTest(source, member.name, operator, kind, values)


def _kind(literal: _Literal) -> Kind:
    found = kind_of(literal.value)
    assert found is not None
    return found


def _check_regex(value: str, position: int) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise _ParseError(f"bad regular expression: {error}", position) from None
    # RE2 has neither look-around nor back-references.
    if re.search(r"\(\?[=!<(#]|\\[1-9]|\(\?P=", value):
        raise _ParseError("regular expressions are RE2: no look-around, no back-references", position)
