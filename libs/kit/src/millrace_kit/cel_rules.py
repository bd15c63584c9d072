"""CEL (cel.dev) expressions over request headers: parse and type-check the part of the language that routes may use.

The same check runs where a manifest is accepted and where a route is put in force. The meaning is CEL's own: a test of an absent
header is an error, an error is not a match, `!` of an error is an error, and `||` holds when one side does whatever the other is.

Accepted: `request.headers['name']` compared with string literals by `==` and `!=`, `in ['a', 'b']`, `'name' in request.headers`,
`.startsWith('a')`, `.endsWith('a')`, `.contains('a')`, `.matches('regex')`, `true`, `false`, `&&`, `||`, `!` and parentheses.
Everything else is refused with the position of the problem.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from millrace_kit.errors import InvalidArgumentError

MAX_LENGTH = 2048
MAX_DEPTH = 32

Operator = Literal["equals", "startsWith", "endsWith", "contains", "matches"]

_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<string>'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\")|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<mark>&&|\|\||==|!=|[!()\[\].,])"
)
_ESCAPES = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "r": "\r", "t": "\t", "`": "`", "?": "?"}
_METHODS: dict[str, Operator] = {
    "startsWith": "startsWith", "endsWith": "endsWith", "contains": "contains", "matches": "matches",
}  # fmt: skip
_HEADER = re.compile(r"[A-Za-z0-9_-]{1,128}")


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


Node = Constant | Present | Test | Not | And | Or


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


def evaluate(node: Node, headers: Mapping[str, str]) -> bool | None:
    """What the rule says about `headers` (names in lower case); None is CEL's error."""
    match node:
        case Constant(value=value):
            return value
        case Present(header=header):
            return header in headers
        case Test(header=header, operator=operator, values=values):
            found = headers.get(header)
            return None if found is None else any(_holds(operator, found, value) for value in values)
        case Not(operand=operand):
            inner = evaluate(operand, headers)
            return None if inner is None else not inner
        case And(left=left, right=right):
            sides = (evaluate(left, headers), evaluate(right, headers))
            return False if False in sides else (None if None in sides else True)
        case Or(left=left, right=right):
            sides = (evaluate(left, headers), evaluate(right, headers))
            return True if True in sides else (None if None in sides else False)


def _holds(operator: Operator, text: str, value: str) -> bool:
    match operator:
        case "equals":
            return text == value
        case "startsWith":
            return text.startswith(value)
        case "endsWith":
            return text.endswith(value)
        case "contains":
            return value in text
        case "matches":
            return re.search(value, text) is not None


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
class _Header:
    name: str


@dataclass(frozen=True, slots=True)
class _Texts:
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Headers:
    pass


# What a relation's side may be, before it is known whether it is a test by itself.
_Operand = Constant | Present | Test | Not | And | Or | _Header | _Texts | _Headers | str


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
        if isinstance(found, (Constant, Present, Test, Not, And, Or)):
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
        if isinstance(found, (Constant, Present, Test, Not, And, Or)):
            return found
        raise _ParseError("is neither true nor false", position)

    def _relation(self) -> _Operand:
        position = self._now.position
        left = self._unary()
        if not any(self._is(mark) for mark in ("==", "!=", "in")):
            return left
        mark = self._take().text
        found = _relate(mark, left, self._unary(), position)
        if any(self._is(mark) for mark in ("==", "!=", "in")):
            raise _ParseError("relations do not chain; use &&", self._now.position)
        return found

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
                if not isinstance(found, _Headers):
                    raise _ParseError("only request.headers can be indexed", position)
                if not _HEADER.fullmatch(name):
                    raise _ParseError(f"{name!r} is no header name", position)
                found = _Header(name.lower())
                continue
            method = self._take()
            operator = _METHODS.get(method.text) if method.kind == "name" else None
            if operator is None or not isinstance(found, _Header):
                known = ", ".join(sorted(_METHODS))
                raise _ParseError(f"unexpected .{method.text}; a header has {known}", method.position)
            self._take("(")
            position = self._now.position
            value = self._text()
            self._take(")")
            if operator == "matches":
                _check_regex(value, position)
            found = Test(found.name, operator, (value,))
        return found

    def _primary(self) -> _Operand:
        token = self._take()
        if token.kind == "string":
            return _unquote(token)
        match token.text:
            case "(":
                found = self._or()
                self._take(")")
                return found
            case "[":
                return self._list()
            case "true" | "false":
                return Constant(token.text == "true")
            case "request":
                self._take(".")
                self._take("headers")
                return _Headers()
        raise _ParseError(f"unexpected {token.shown}; only request.headers is known here", token.position)

    def _list(self) -> _Texts:
        items: list[str] = []
        while not self._is("]"):
            items.append(self._text())
            if not self._is("]"):
                self._take(",")
        self._take("]")
        return _Texts(tuple(items))


def _relate(mark: str, left: _Operand, right: _Operand, position: int) -> Node:
    match mark, left, right:
        case "==" | "!=", _Header(name=name), str(value):
            test: Node = Test(name, "equals", (value,))
        case "==" | "!=", str(value), _Header(name=name):
            test = Test(name, "equals", (value,))
        case "in", _Header(name=name), _Texts(values=values):
            test = Test(name, "equals", values)
        case "in", str(value), _Headers():
            if not _HEADER.fullmatch(value):
                raise _ParseError(f"{value!r} is no header name", position)
            test = Present(value.lower())
        case _:
            raise _ParseError(f"{mark!r} compares a header with a string, or looks into a list of strings", position)
    return Not(test) if mark == "!=" else test


def _check_regex(value: str, position: int) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise _ParseError(f"bad regular expression: {error}", position) from None
    # RE2 has neither look-around nor back-references.
    if re.search(r"\(\?[=!<(#]|\\[1-9]|\(\?P=", value):
        raise _ParseError("regular expressions are RE2: no look-around, no back-references", position)
