"""What Feast's clients send, read into the same form: JSON bodies and gRPC messages.

Values are taken as Feast takes them: a text that is a number will do for an integer join key, an integer for a text one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from millrace_api.feature.v1 import feast_pb2
from millrace_kit.errors import InvalidArgumentError

from millrace_feature.feast_wire.errors import no_request_data
from millrace_feature.feast_wire.selection import Selection, Wanted
from millrace_feature.plan import ValueType
from millrace_feature.serving import Entity

MAX_ROWS = 1000


class BodyError(Exception):
    """The body is no JSON object of the right form; the message says where."""


@dataclass(frozen=True, slots=True)
class Request:
    """A read, whichever way it came."""

    wanted: Wanted
    columns: Mapping[str, Sequence[Any]]
    """Values by name of join key or request field."""
    with_versions: bool = False
    """Whether the answer names the views and their versions."""


class _Body(msgspec.Struct):
    entities: dict[str, list[Any]]
    feature_service: str | None = None
    features: list[str] = []
    full_feature_names: bool = False
    include_feature_view_version_metadata: bool = False


_DECODER = msgspec.json.Decoder(_Body)


def from_json(body: bytes) -> Request:
    """The request of a JSON body.

    Raises:
        BodyError: it is none.
    """
    try:
        found = _DECODER.decode(body)
    except msgspec.DecodeError as error:
        raise BodyError(str(error)) from None
    if found.feature_service:
        wanted = Wanted(service=found.feature_service, full_names=found.full_feature_names)
    else:
        wanted = Wanted(features=tuple(found.features), full_names=found.full_feature_names)
    return Request(wanted, found.entities, found.include_feature_view_version_metadata)


def from_message(message: feast_pb2.FeastOnlineRequest) -> Request:
    """The request of a gRPC message.

    Raises:
        InvalidArgumentError: a value is of a kind that join keys and request fields do not have.
    """
    if message.WhichOneof("kind") == "feature_service":
        wanted = Wanted(service=message.feature_service, full_names=message.full_feature_names)
    else:
        wanted = Wanted(features=tuple(message.features.val), full_names=message.full_feature_names)
    columns = {name: _plain(name, values.val) for name, values in message.entities.items()}
    columns.update((name, _plain(name, values.val)) for name, values in message.request_context.items())
    return Request(wanted, columns, message.include_feature_view_version_metadata)


def _plain(name: str, values: Sequence[feast_pb2.FeastValue]) -> list[Any]:
    found: list[Any] = []
    for i, value in enumerate(values):
        kind = value.WhichOneof("val")
        if kind is None or kind == "null_val":
            if kind is None and value.ByteSize():
                raise InvalidArgumentError(f"entities.{name}[{i}]", "is neither text, number, boolean nor timestamp")
            found.append(None)
        elif kind == "unix_timestamp_val":
            found.append(datetime.fromtimestamp(value.unix_timestamp_val, tz=UTC))
        else:
            found.append(getattr(value, kind))
    return found


@dataclass(frozen=True, slots=True)
class Given:
    """The rows of a request, and its join keys as the answer repeats them."""

    rows: list[Entity]
    keys: list[tuple[str, str, Sequence[Any]]]
    """(name, Feast's type, values) in the request's order."""


def given(selection: Selection, columns: Mapping[str, Sequence[Any]]) -> Given:
    """The request's columns as rows. Columns that the selection does not know are left out, as Feast does.

    Raises:
        InvalidArgumentError: lengths differ, a value has the wrong kind, or a join key or request field is not there.
    """
    if not columns:
        raise InvalidArgumentError("entities", "holds no column")
    lengths = {len(values) for values in columns.values()}
    if len(lengths) > 1:
        problem = "all columns need the same length: " + ", ".join(f"{k} has {len(v)}" for k, v in columns.items())
        raise InvalidArgumentError("entities", problem)
    count = lengths.pop()
    if not 1 <= count <= MAX_ROWS:
        raise InvalidArgumentError("entities", f"needs 1 to {MAX_ROWS} rows, not {count}")
    keys: list[tuple[str, str, Sequence[Any]]] = []
    known: dict[str, list[Any]] = {}
    for name, values in columns.items():
        if name in selection.request_fields:
            known[name] = _column(name, selection.request_fields[name], values)
        elif name in selection.keys:
            kind = selection.keys[name]
            known[name] = _column(name, "string" if kind == "STRING" else "int64", values)
            keys.append((name, kind, known[name]))
    if missing := [name for name in selection.request_fields if name not in known]:
        raise no_request_data(missing)
    for name, view in selection.key_users.items():
        if name not in known:
            raise InvalidArgumentError(f"entities.{name}", f"is needed: it is a join key of feature view {view}")
    if len(known) == 1:
        ((name, column),) = known.items()
        return Given([{name: value} for value in column], keys)
    names = tuple(known)
    return Given([dict(zip(names, row, strict=True)) for row in zip(*known.values(), strict=True)], keys)


def _column(name: str, kind: ValueType, values: Sequence[Any]) -> list[Any]:
    wanted = str if kind == "string" else int if kind == "int64" else None
    if wanted is not None and all(type(value) is wanted for value in values):
        return list(values)
    return [None if value is None else _taken(name, i, kind, value) for i, value in enumerate(values)]


def _taken(name: str, row: int, kind: ValueType, value: Any) -> Any:
    problem = InvalidArgumentError(f"entities.{name}[{row}]", f"{value!r} is no {kind}")
    if isinstance(value, list | dict):
        raise problem
    try:
        return _READERS[kind](value)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise problem from None


def _integer(value: Any) -> int:
    number = int(value)
    if isinstance(value, float) and value != number:
        raise ValueError
    return number


def _number(value: Any) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number


def _truth(value: Any) -> bool:
    if isinstance(value, str):
        return {"true": True, "false": False}[value.lower()]
    return bool(value)


def _instant(value: Any) -> datetime:
    if isinstance(value, datetime):
        return value
    if isinstance(value, str):
        found = datetime.fromisoformat(value)
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return datetime.fromtimestamp(value, tz=UTC)


_READERS: Mapping[ValueType, Any] = {
    "string": str,
    "int64": _integer,
    "double": _number,
    "bool": _truth,
    "timestamp": _instant,
}
