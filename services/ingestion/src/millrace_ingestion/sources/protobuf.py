"""Protobuf values, with Confluent's wire format or a schema of the source."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2, wrappers_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from millrace_kit.errors import InvalidArgumentError

from millrace_ingestion.sources.avro import named_float
from millrace_ingestion.sources.decoding import UndecodableError

# Levels of messages inside messages that are followed; deeper ones are left out.
MAX_DEPTH = 8
MAX_INDEXES = 32
_WRAPPERS = {f"google.protobuf.{name}" for name in wrappers_pb2.DESCRIPTOR.message_types_by_name}
_TIMESTAMP = "google.protobuf.Timestamp"
_WELL_KNOWN = (timestamp_pb2, wrappers_pb2)
Read = Callable[[bytes], Mapping[str, Any]]


class Schema:
    """A compiled file with what it imports.

    Args:
        files: serialized FileDescriptorProtos; the one whose messages are read is the last.

    Raises:
        InvalidArgumentError: they are no descriptors, or something that they import is missing.
    """

    def __init__(self, files: Sequence[bytes]) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        self._readers: dict[str, Read] = {}
        try:
            parsed = [descriptor_pb2.FileDescriptorProto.FromString(file) for file in files]
            names = {file.name for file in parsed}
            for module in _WELL_KNOWN:
                if module.DESCRIPTOR.name not in names:
                    self._pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
            for file in parsed:
                self._pool.AddSerializedFile(file.SerializeToString())
            self._file = self._pool.FindFileByName(parsed[-1].name) if parsed else None
        except (DecodeError, TypeError, KeyError, ValueError) as error:
            raise InvalidArgumentError("schema", f"is no complete protobuf schema: {error}") from None

    @classmethod
    def of_set(cls, serialized: bytes) -> "Schema":
        """The schema of a serialized FileDescriptorSet (`protoc --include_imports --descriptor_set_out`)."""
        try:
            files = descriptor_pb2.FileDescriptorSet.FromString(serialized).file
        except DecodeError as error:
            raise InvalidArgumentError("schema", f"is no FileDescriptorSet: {error}") from None
        if not files:
            raise InvalidArgumentError("schema", "is an empty FileDescriptorSet")
        return cls([file.SerializeToString() for file in files])

    def named(self, name: str) -> Read:
        """The reader of the message with that full name.

        Raises:
            InvalidArgumentError: there is none.
        """
        try:
            return self._reader(self._pool.FindMessageTypeByName(name))
        except KeyError:
            raise InvalidArgumentError("message_name", f"the schema has no message {name!r}") from None

    def indexed(self, indexes: Sequence[int]) -> Read:
        """The reader of the message at Confluent's message indexes.

        Raises:
            UndecodableError: there is none.
        """
        try:
            assert self._file is not None
            found = list(self._file.message_types_by_name.values())[indexes[0]]
            for index in indexes[1:]:
                found = found.nested_types[index]
        except IndexError:
            raise UndecodableError(f"the schema has no message at the indexes {list(indexes)}") from None
        return self._reader(found)

    def _reader(self, descriptor: Descriptor) -> Read:
        if descriptor.full_name not in self._readers:
            self._readers[descriptor.full_name] = _reader_of(descriptor)
        return self._readers[descriptor.full_name]


def read_indexes(value: bytes, at: int) -> tuple[Sequence[int], int]:
    """Confluent's message indexes, zigzag varints, and where the message begins.

    Raises:
        UndecodableError: they do not end.
    """
    count, at = _varint(value, at)
    if count == 0:
        return (0,), at
    if not 0 < count <= MAX_INDEXES:
        raise UndecodableError(f"{count} message indexes")
    indexes = []
    for _ in range(count):
        index, at = _varint(value, at)
        if index < 0:
            raise UndecodableError(f"message index {index}")
        indexes.append(index)
    return indexes, at


def _varint(value: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        if at >= len(value) or shift > 28:
            raise UndecodableError("the message indexes do not end")
        byte = value[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), at


def _reader_of(descriptor: Descriptor) -> Read:
    kind = message_factory.GetMessageClass(descriptor)
    convert = _message_converter(descriptor, MAX_DEPTH)

    def read(value: bytes) -> Mapping[str, Any]:
        try:
            message = kind.FromString(value)
        except DecodeError as error:
            raise UndecodableError(f"the value is no {descriptor.full_name}: {error}", cause="DecodeError") from None
        return convert(message)

    return read


def _message_converter(descriptor: Descriptor, depth: int) -> Callable[[Message], dict[str, Any]]:
    """Reads every field by its name in the schema; a field that is absent and can be so is null."""
    plain: list[tuple[str, Callable[[Any], Any] | None]] = []
    optional: list[tuple[str, Callable[[Any], Any] | None]] = []
    for field in descriptor.fields:
        if field.message_type is not None and depth == 0:
            continue
        converter = _converter(field, depth)
        (optional if field.has_presence and not field.is_repeated else plain).append((field.name, converter))

    def convert(message: Message) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for name, converter in plain:
            value = getattr(message, name)
            record[name] = value if converter is None else converter(value)
        for name, converter in optional:
            if message.HasField(name):
                value = getattr(message, name)
                record[name] = value if converter is None else converter(value)
            else:
                record[name] = None
        return record

    return convert


def _converter(field: FieldDescriptor, depth: int) -> Callable[[Any], Any] | None:
    """How a field's value becomes what JSON can hold; None leaves it as it is."""
    if field.is_repeated:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value_of = _single(field.message_type.fields_by_name["value"], depth)
            return lambda entries: {str(key): value_of(entries[key]) for key in entries}
        one = _single(field, depth)
        return lambda values: [one(value) for value in values]
    if field.type in {FieldDescriptor.TYPE_ENUM, FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_GROUP} or (
        field.type in {FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE}
    ):
        return _single(field, depth)
    return None


def _single(field: FieldDescriptor, depth: int) -> Callable[[Any], Any]:
    if field.type in {FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE}:
        return _number
    if field.enum_type is not None:
        names: dict[int, str] = {value.number: value.name for value in field.enum_type.values}
        return lambda number: names.get(number, number)
    if field.message_type is None:
        return lambda value: value
    if field.message_type.full_name == _TIMESTAMP:
        return lambda stamp: stamp.seconds * 1_000_000 + stamp.nanos // 1_000
    if field.message_type.full_name in _WRAPPERS:
        return lambda wrapper: _number(wrapper.value) if isinstance(wrapper.value, float) else wrapper.value
    if depth == 0:
        return lambda _message: None
    inner_type = field.message_type
    nested: Callable[[Message], dict[str, Any]] | None = None

    def convert(message: Message) -> dict[str, Any]:
        nonlocal nested
        if nested is None:  # made when one comes: a message may hold itself
            nested = _message_converter(inner_type, depth - 1)
        return nested(message)

    return convert


def _number(value: float) -> float | str:
    return value if value - value == 0.0 else named_float(value)
