"""Avro values, with Confluent's wire format or a schema of the source."""

import io
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fastavro
from fastavro.schema import SchemaParseException, UnknownType
from millrace_kit.errors import InvalidArgumentError

from millrace_ingestion.sources.decoding import UndecodableError

# Whatever fastavro raises for bytes that are not of the schema.
_BROKEN = (
    EOFError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error, RecursionError, AttributeError,
    ArithmeticError, StopIteration,
)  # fmt: skip
Read = Callable[[bytes], Mapping[str, Any]]


def avro_reader(schema: str, references: Sequence[str] = ()) -> Read:
    """A reader of values with one schema.

    Args:
        schema: as JSON.
        references: schemas of the names it uses, the innermost first.

    Raises:
        InvalidArgumentError: it is no Avro schema of a record.
    """
    named: dict[str, Any] = {}
    try:
        for text in references:
            fastavro.parse_schema(json.loads(text), named_schemas=named)
        parsed = fastavro.parse_schema(json.loads(schema), named_schemas=named)
    except (SchemaParseException, UnknownType, *_BROKEN) as error:
        raise InvalidArgumentError("schema", f"is no Avro schema: {error}") from None
    if not isinstance(parsed, dict) or parsed.get("type") != "record":
        raise InvalidArgumentError("schema", "is no Avro record")
    floats = [one["name"] for one in parsed["fields"] if _is_float(one["type"])]

    def read(value: bytes) -> Mapping[str, Any]:
        stream = io.BytesIO(value)
        try:
            record: dict[str, Any] = fastavro.schemaless_reader(stream, parsed, None)
        except _BROKEN as error:
            raise UndecodableError(
                f"the value is not of its Avro schema: {error}", cause=type(error).__name__
            ) from None
        if stream.tell() != len(value):
            raise UndecodableError(f"{len(value) - stream.tell()} bytes follow the Avro record")
        for name in floats:
            number = record.get(name)
            if isinstance(number, float) and not math.isfinite(number):
                record[name] = named_float(number)
        return record

    return read


def named_float(number: float) -> str:
    """What protobuf's JSON mapping calls a float that is no JSON number."""
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def _is_float(kind: Any) -> bool:
    if isinstance(kind, list):
        return any(_is_float(one) for one in kind)
    if isinstance(kind, dict):
        return _is_float(kind.get("type"))
    return kind in {"float", "double"}
