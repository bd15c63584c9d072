"""CEL (cel.dev) expressions over request headers: parse and type-check the part of the language that routes may use.

The same check runs where a manifest is accepted and where a route is put in force; the gateway hands the checked expression to
Envoy's own CEL matcher, so evaluation has CEL's semantics: a header that is absent makes a comparison an error, an error does
not match, and `||` still matches when its other side holds.

Accepted: `request.headers['name']`, string, integer and boolean literals, lists of strings, `==`, `!=`, `<`, `<=`, `>`, `>=`,
`in`, `&&`, `||`, `!`, parentheses, `.startsWith(s)`, `.endsWith(s)`, `.contains(s)`, `.matches(regex)`, `size(s)`. The whole
expression must be a boolean. Everything else is refused with the position of the problem.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from millrace_kit.errors import InvalidArgumentError

MAX_LENGTH = 2048
MAX_DEPTH = 32

Type = Literal["bool", "string", "int", "list", "headers"]

_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<string>'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\")|(?P<int>\d+)(?![\w.])"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<mark>&&|\|\||==|!=|<=|>=|[<>!()\[\].,-])"
)
_ESCAPES = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "r": "\r", "t": "\t", "`": "`", "?": "?"}
_RELATIONS = {"==": "_==_", "!=": "_!=_", "<": "_<_", "<=": "_<=_", ">": "_>_", ">=": "_>=_", "in": "@in"}
_METHODS = {"startsWith", "endsWith", "contains", "matches"}
_INT64_MAX = 2**63 - 1
_HEADER = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant, or a list of constant strings."""

    value: str | int | bool | tuple[str, ...]
    type: Type


@dataclass(frozen=True, slots=True)
class Headers:
    """`request.headers`."""

    type: Type = "headers"


@dataclass(frozen=True, slots=True)
class Call:
    """A function by CEL's internal name (`_==_`, `_&&_`, `!_`, `@in`, `_[_]`, `startsWith`, `size`); a method has its target first."""

    function: str
    arguments: tuple["Node", ...]
    type: Type
    method: bool = False


Node = Constant | Headers | Call


class _ParseError(Exception):
    def __init__(self, problem: str, position: int) -> None:
        super().__init__(f"{problem} at character {position + 1}")


def check_rule(expression: str, field: str) -> Node:
    """The syntax tree of `expression`.

    Raises:
        InvalidArgumentError: it is too long, is no CEL, uses something outside the accepted part, or is no boolean; names `field`.
    """
    if not expression.strip():
        raise InvalidArgumentError(field, "must not be empty", "INVALID_RULE")
    if len(expression) > MAX_LENGTH:
        raise InvalidArgumentError(field, f"is longer than {MAX_LENGTH} characters", "INVALID_RULE")
    try:
        return _Parser(expression).parse()
    except _ParseError as error:
        raise InvalidArgumentError(field, str(error), "INVALID_RULE") from None


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int


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
    """Recursive descent over CEL's precedence: `||`, `&&`, relations, unary, member, primary."""

    def __init__(self, expression: str) -> None:
        self._tokens = _tokens(expression)
        self._index = 0
        self._depth = 0

    @property
    def _now(self) -> _Token:
        return self._tokens[self._index]

    def _take(self, text: str = "") -> _Token:
        token = self._now
        if text and token.text != text:
            raise _ParseError(f"expected {text!r}, found {token.text or 'the end'!r}", token.position)
        self._index += 1
        return token

    def parse(self) -> Node:
        node = self._or()
        if self._now.kind != "end":
            raise _ParseError(f"unexpected {self._now.text!r}", self._now.position)
        self._need(node, "bool", 0)
        return node

    def _need(self, node: Node, kind: Type, position: int) -> Node:
        if node.type != kind:
            raise _ParseError(f"needs a {kind}, found a {node.type}", position)
        return node

    def _or(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _ParseError(f"nested deeper than {MAX_DEPTH}", self._now.position)
        node = self._binary("||", "_||_", self._and)
        self._depth -= 1
        return node

    def _and(self) -> Node:
        return self._binary("&&", "_&&_", self._relation)

    def _binary(self, mark: str, function: str, operand: Callable[[], Node]) -> Node:
        position = self._now.position
        node: Node = operand()
        while self._now.text == mark and self._now.kind == "mark":
            self._need(node, "bool", position)
            self._take()
            position = self._now.position
            right = self._need(operand(), "bool", position)
            node = Call(function, (node, right), "bool")
        return node

    def _relation(self) -> Node:
        position = self._now.position
        left = self._unary()
        mark = self._now.text
        if mark not in _RELATIONS or self._now.kind == "string":
            return left
        self._take()
        right = self._unary()
        if self._now.text in _RELATIONS and self._now.kind != "string":
            raise _ParseError("relations do not chain; use &&", self._now.position)
        if mark == "in":
            self._need(left, "string", position)
            if right.type not in {"list", "headers"}:
                raise _ParseError(f"'in' needs a list or request.headers, found a {right.type}", position)
        elif left.type != right.type or left.type not in {"string", "int", "bool"}:
            raise _ParseError(f"cannot compare a {left.type} with a {right.type}", position)
        return Call(_RELATIONS[mark], (left, right), "bool")

    def _unary(self) -> Node:
        if self._now.kind == "mark" and self._now.text == "!":
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise _ParseError(f"nested deeper than {MAX_DEPTH}", self._now.position)
            self._take()
            position = self._now.position
            node = Call("!_", (self._need(self._unary(), "bool", position),), "bool")
            self._depth -= 1
            return node
        if self._now.kind == "mark" and self._now.text == "-":
            self._take()
            token = self._take()
            if token.kind != "int":
                raise _ParseError("'-' needs a number", token.position)
            return Constant(-self._integer(token), "int")
        return self._member()

    def _member(self) -> Node:
        node = self._primary()
        while self._now.kind == "mark" and self._now.text in {".", "["}:
            if self._take().text == "[":
                position = self._now.position
                key = self._or()
                self._take("]")
                if node.type != "headers" or not isinstance(key, Constant) or not isinstance(key.value, str):
                    raise _ParseError("only request.headers['name'] can be indexed, by a literal name", position)
                if not _HEADER.fullmatch(key.value):
                    raise _ParseError("is no header name", position)
                # Envoy keeps header names in lower case.
                node = Call("_[_]", (node, Constant(key.value.lower(), "string")), "string")
                continue
            method = self._take()
            if method.text not in _METHODS:
                raise _ParseError(f"unknown method {method.text!r}; there are {sorted(_METHODS)}", method.position)
            self._take("(")
            position = self._now.position
            argument = self._need(self._or(), "string", position)
            self._take(")")
            self._need(node, "string", method.position)
            if method.text == "matches":
                _check_regex(argument, position)
            node = Call(method.text, (node, argument), "bool", method=True)
        return node

    def _primary(self) -> Node:
        token = self._take()
        if token.kind == "string":
            return Constant(_unquote(token), "string")
        if token.kind == "int":
            return Constant(self._integer(token), "int")
        if token.text == "(" and token.kind == "mark":
            node = self._or()
            self._take(")")
            return node
        if token.text == "[" and token.kind == "mark":
            return self._list()
        if token.text in {"true", "false"}:
            return Constant(token.text == "true", "bool")
        if token.text == "size":
            self._take("(")
            position = self._now.position
            node = self._need(self._or(), "string", position)
            self._take(")")
            return Call("size", (node,), "int")
        if token.text == "request":
            self._take(".")
            self._take("headers")
            return Headers()
        found = token.text or "the end"
        raise _ParseError(f"unexpected {found!r}; only request.headers and literals are known here", token.position)

    def _list(self) -> Node:
        items: list[str] = []
        while self._now.text != "]" or self._now.kind == "string":
            token = self._take()
            if token.kind != "string":
                raise _ParseError("a list holds string literals", token.position)
            items.append(_unquote(token))
            if self._now.text != "]" or self._now.kind == "string":
                self._take(",")
        self._take("]")
        return Constant(tuple(items), "list")

    def _integer(self, token: _Token) -> int:
        value = int(token.text) if len(token.text) <= 19 else _INT64_MAX + 1
        if value > _INT64_MAX:
            raise _ParseError("is larger than a 64-bit integer", token.position)
        return value


def _check_regex(argument: Node, position: int) -> None:
    if not isinstance(argument, Constant) or not isinstance(argument.value, str):
        raise _ParseError("matches() needs a literal expression", position)
    try:
        re.compile(argument.value)
    except re.error as error:
        raise _ParseError(f"bad regular expression: {error}", position) from None
    # RE2 has neither look-around nor back-references.
    if re.search(r"\(\?[=!<]|\\[1-9]", argument.value):
        raise _ParseError("regular expressions are RE2: no look-around, no back-references", position)
