"""Messages of a topic as the JSON lines that a batch carries.

Plain JSON objects whose members are the contract's columns are joined, not parsed: the landing parses them anyway. Where a column comes
from a header, a key or a place, it is appended to the object's text (of two members with one name the last counts). Everything else, Avro
and protobuf among it, becomes an object first. What cannot become one is a dead letter that keeps the message.
"""

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import msgspec

from millrace_ingestion.checks import UNDECODABLE, Failure, Reject
from millrace_ingestion.contracts import Contract
from millrace_ingestion.origins import HEADER_CONVERTER, KEY_CONVERTER, VALUE_CONVERTER, Origin
from millrace_ingestion.sources.specs import CloudEvents, Source, TopicSpec

MICROSECONDS_PER_MS = 1_000
# confluent_kafka.TIMESTAMP_NOT_AVAILABLE
_NO_TIMESTAMP = 0
_STRUCTURED = b"application/cloudevents"
_encode = msgspec.json.Encoder(decimal_format="number").encode
_EXTENSIONS = {"ce_type": "type", "ce_source": "source", "ce_subject": "subject"}


class Message(Protocol):
    """What is used of `confluent_kafka.Message`."""

    def topic(self) -> str: ...  # noqa: D102
    def partition(self) -> int: ...  # noqa: D102
    def offset(self) -> int: ...  # noqa: D102
    def key(self) -> bytes | None: ...  # noqa: D102
    def value(self) -> bytes | None: ...  # noqa: D102
    def headers(self) -> Sequence[tuple[str, bytes | None]] | None: ...  # noqa: D102
    def timestamp(self) -> tuple[int, int]: ...  # noqa: D102


class UndecodableError(Exception):
    """A message that is no record.

    Args:
        detail: for people.
        stage: Kafka Connect's name of the step.
        cause: class of the error behind it.
    """

    def __init__(self, detail: str, stage: str = VALUE_CONVERTER, cause: str = "") -> None:
        super().__init__(detail)
        self.stage = stage
        self.cause = cause or type(self).__name__


@dataclass(frozen=True)
class Decoded:
    """One batch of messages."""

    json_lines: bytes
    origins: Sequence[Origin]
    """Where each line came from."""
    undecodable: Sequence[Reject]


class Origins(Sequence[Origin]):
    """The origins of messages, made when somebody looks: almost no record is refused."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = messages

    def __len__(self) -> int:
        return len(self._messages)

    @overload
    def __getitem__(self, index: int) -> Origin: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Origin]: ...
    def __getitem__(self, index: int | slice) -> Origin | Sequence[Origin]:
        if isinstance(index, slice):
            return Origins(self._messages[index])
        return origin_of(self._messages[index])


def origin_of(message: Message, *, max_value_bytes: int | None = None) -> Origin:
    """Where a message came from, with the message itself unless it is larger than `max_value_bytes`."""
    kind, timestamp_ms = message.timestamp()
    value = message.value()
    if max_value_bytes is not None and value is not None and len(value) > max_value_bytes:
        value = None
    return Origin(
        message.topic(),
        message.partition(),
        message.offset(),
        timestamp_ms if kind != _NO_TIMESTAMP else 0,
        message.key(),
        value,
        tuple(message.headers() or ()),
    )


def undecodable(row: int, message: Message, error: UndecodableError, max_value_bytes: int | None = None) -> Reject:
    """The dead letter of a message that is no record."""
    origin = origin_of(message, max_value_bytes=max_value_bytes)
    return Reject(row, Failure(UNDECODABLE, "", str(error)[:500]), "", origin, error.stage, error.cause)


Attributes = Mapping[str, Any]
"""A CloudEvent's attributes; empty when the message is none."""
Parse = Callable[[bytes], Mapping[str, Any]]
"""The value as an object; UndecodableError when it is none, UnavailableError when that cannot be told now."""
Getter = Callable[[Message, Mapping[str, Any], Attributes], Any]


class Decoder:
    """Makes batches of the messages of one source.

    Args:
        source: what it reads.
        contract: the newest version; the columns that are looked for.
        parse: reads a value that is no JSON; None for JSON.
        max_bytes: largest message that is taken.
    """

    def __init__(self, source: Source, contract: Contract, parse: Parse | None, *, max_bytes: int) -> None:
        spec = source.spec
        assert isinstance(spec, TopicSpec)
        self._spec = spec
        self._max_bytes = max_bytes
        self._events = spec.cloud_events
        self._parse = parse
        columns = _columns(source.columns, contract, spec.cloud_events)
        self._getters = [(column, _getter(origin)) for column, origin in columns.items()]
        self._others = [column.name for column in contract.columns if column.name not in columns]
        nested = any(not origin.startswith("@") for origin in source.columns.values())
        self._as_text = parse is None and not nested and self._events in {CloudEvents.NONE, CloudEvents.BINARY}

    def decode(self, messages: Sequence[Message]) -> Decoded:
        """The messages of one partition as one batch.

        Raises:
            UnavailableError: a schema is needed and the registry does not answer.
        """
        if self._as_text and not self._getters:
            values = [message.value() for message in messages]
            if all(values):
                joined = b"\n".join(values)  # type: ignore[arg-type]
                if len(joined) <= self._max_bytes and joined.count(b"\n") == len(values) - 1 and _objects(values):
                    return Decoded(joined, Origins(messages), ())
        lines: list[bytes] = []
        kept: list[Message] = []
        refused: list[Reject] = []
        for row, message in enumerate(messages):
            try:
                line = self._line(message)
            except UndecodableError as error:
                refused.append(undecodable(row, message, error, self._max_bytes))
                continue
            if line is not None:
                lines.append(line)
                kept.append(message)
        return Decoded(b"\n".join(lines), Origins(kept), refused)

    def _line(self, message: Message) -> bytes | None:
        """The record of one message; None when it is left out."""
        value = message.value()
        if value is None:
            if self._spec.skip_tombstones:
                return None
            raise UndecodableError("the message has no value (a tombstone)")
        if len(value) > self._max_bytes:
            raise UndecodableError(f"the message has {len(value)} bytes; max_batch_mib allows {self._max_bytes}")
        if self._as_text:
            return self._spliced(message, value)
        document, attributes = self._document(message, value)
        record = {name: document[name] for name in self._others if name in document}
        for column, getter in self._getters:
            record[column] = getter(message, document, attributes)
        return _to_json(record)

    def _spliced(self, message: Message, value: bytes) -> bytes:
        """The text of an object on one line, with the columns that come from elsewhere."""
        text = _without_head(value).strip(b" \t\r\n")
        if b"\n" in text:
            text = _one_line(text)
        if not text.startswith(b"{"):
            raise UndecodableError("the value is no JSON object")
        if not self._getters:
            return text
        extra = _encode({column: getter(message, {}, {}) for column, getter in self._getters})
        if not text.endswith(b"}"):
            return text  # the landing says what is wrong with it
        members = text[1:-1]
        return b"{" + members + b"," + extra[1:] if members.strip() else extra

    def _document(self, message: Message, value: bytes) -> tuple[Mapping[str, Any], Attributes]:
        if self._events is CloudEvents.STRUCTURED or (
            self._events is CloudEvents.BOTH and (_header(message, "content-type") or b"").startswith(_STRUCTURED)
        ):
            return _structured(value)
        attributes: Attributes = {}
        if self._events is not CloudEvents.NONE:
            attributes = {name[3:]: _text(text) for name, text in message.headers() or () if name.startswith("ce_")}
        return (self._parse or parse_json)(value), attributes


def parse_json(value: bytes) -> Mapping[str, Any]:
    """A JSON object."""
    try:
        document = msgspec.json.decode(_without_head(value))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UndecodableError(f"the value is no JSON: {error}", cause=type(error).__name__) from None
    if not isinstance(document, dict):
        raise UndecodableError("the value is no JSON object")
    return document


def _without_head(value: bytes) -> bytes:
    """JSON without Confluent's wire format, whose schema is not needed: the contract has the checks. No JSON begins with this byte."""
    return value[5:] if value.startswith(b"\x00") else value


def _structured(value: bytes) -> tuple[Mapping[str, Any], Attributes]:
    """A CloudEvent in JSON: data and attributes."""
    event = dict(parse_json(value))
    if "specversion" not in event:
        raise UndecodableError("the value is no CloudEvent: it has no specversion")
    data = event.pop("data", None)
    encoded = event.pop("data_base64", None)
    if isinstance(encoded, str):
        try:
            data = parse_json(base64.b64decode(encoded, validate=True))
        except binascii.Error as error:
            raise UndecodableError(f"data_base64 is no base64: {error}", cause="binascii.Error") from None
    if not isinstance(data, dict):
        raise UndecodableError("the data of the CloudEvent is no JSON object")
    return data, event


def _columns(given: Mapping[str, str], contract: Contract, mode: CloudEvents) -> Mapping[str, str]:
    """Where columns come from, when not from the member of the same name."""
    if mode is CloudEvents.NONE:
        return given
    names = {column.name for column in contract.columns}
    usual = {contract.event_id_column: "id", contract.event_time_column: "time"}
    usual |= {column: attribute for column, attribute in _EXTENSIONS.items() if column in names}
    prefix = "@header.ce_" if mode is CloudEvents.BINARY else "@event."
    return {**{column: prefix + attribute for column, attribute in usual.items() if column}, **given}


def _getter(origin: str) -> Getter:
    match origin:
        case "@key":
            return lambda message, _document, _event: _text(message.key(), KEY_CONVERTER)
        case "@timestamp":
            return lambda message, _document, _event: _timestamp_us(message)
        case "@topic":
            return lambda message, _document, _event: message.topic()
        case "@partition":
            return lambda message, _document, _event: message.partition()
        case "@offset":
            return lambda message, _document, _event: message.offset()
        case "@position":
            return lambda message, _d, _e: f"{message.topic()}-{message.partition()}-{message.offset()}"
    if origin.startswith("@header."):
        name = origin.removeprefix("@header.")
        return lambda message, _document, _event: _text(_header(message, name))
    if origin.startswith("@event."):
        attribute = origin.removeprefix("@event.")
        return lambda _message, _document, event: event.get(attribute)
    path = origin.split(".")
    return lambda _message, document, _event: _member(document, path)


def _member(document: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(document, Mapping):
            return None
        document = document.get(name)
    return document


def _timestamp_us(message: Message) -> int | None:
    kind, timestamp_ms = message.timestamp()
    return timestamp_ms * MICROSECONDS_PER_MS if kind != _NO_TIMESTAMP else None


def _header(message: Message, name: str) -> bytes | None:
    """The last header of that name."""
    found = None
    for header, value in message.headers() or ():
        if header == name:
            found = value
    return found


def _text(value: bytes | None, stage: str = HEADER_CONVERTER) -> str | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UndecodableError(f"no UTF-8: {error}", stage, "UnicodeDecodeError") from None


def _one_line(text: bytes) -> bytes:
    try:
        return msgspec.json.format(text, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UndecodableError(f"the value is no JSON: {error}", cause=type(error).__name__) from None


def _objects(values: Sequence[bytes | None]) -> bool:
    return all([value.startswith(b"{") for value in values])  # type: ignore[union-attr]  # noqa: C419 - a list is faster


def _to_json(record: Mapping[str, Any]) -> bytes:
    try:
        return _encode(record)
    except (TypeError, ValueError, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise UndecodableError(f"a value has no JSON: {error}", cause=type(error).__name__) from None
