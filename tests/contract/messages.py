"""Random protobuf messages from a seed: boundary values, plausible names and nonsense, in every field."""

import math
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pyarrow as pa
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

MAX_DEPTH = 5
MAX_REPEATED = 3
LONG = 5000
F = FieldDescriptor
INT_BITS: Mapping[int, tuple[int, int]] = {
    F.TYPE_INT32: (-(1 << 31), (1 << 31) - 1), F.TYPE_SINT32: (-(1 << 31), (1 << 31) - 1),
    F.TYPE_SFIXED32: (-(1 << 31), (1 << 31) - 1), F.TYPE_UINT32: (0, (1 << 32) - 1), F.TYPE_FIXED32: (0, (1 << 32) - 1),
    F.TYPE_INT64: (-(1 << 63), (1 << 63) - 1), F.TYPE_SINT64: (-(1 << 63), (1 << 63) - 1),
    F.TYPE_SFIXED64: (-(1 << 63), (1 << 63) - 1), F.TYPE_UINT64: (0, (1 << 64) - 1), F.TYPE_FIXED64: (0, (1 << 64) - 1),
}  # fmt: skip
# Words that get a request past its first checks and into what lies behind them.
WORDS = (
    "", "a", "m", "flights", "outcomes", "weather", "flight-delay", "flight_id", "flight_delay", "1.0.0", "1.1.0-rc.1", "a" * 64, "b" * 64,
    "model.onnx", "../../etc/passwd", "/", "\0", "é✈\u202e", "'; DROP TABLE model; --", "{}", "[]", "null", "{{x}}", "%s%n", "0", "-1",
    "FP32", "onnxruntime_onnx", "2013-07-01T00:00:00Z", "file:///nowhere", "name: x\nstages: []", "apiVersion: v1", "x" * LONG, "string",
    "int64", "view__feature", "request.headers['x'] == 'y'", "true",
)  # fmt: skip
# What a field of such a name usually holds; a message made mostly of these gets deep into a service.
HINTS: Sequence[tuple[str, Sequence[str]]] = (
    (r"sha256|digest|hash", ("a" * 64, "b" * 64)),
    (r"version$", ("1.0.0", "1.1.0")),
    (r"contract|^table$", ("flights", "outcomes")),
    (r"^(model|name|pipeline|deployment|project)$", ("m", "flights")),
    (r"column|^key$|field|subject", ("flight_id", "late")),
    (r"actor|source|gateway_id", ("ann",)),
    (r"path", ("model.onnx", "a/b.json")),
    (r"datatype", ("FP32",)),
    (r"^type$|kind", ("string", "int64", "timestamp")),
    (r"platform", ("onnxruntime_onnx",)),
    (r"page_token|parent_version|definitions_hash", ("",)),
    (r"feature_service", ("flight_delay",)),
    (r"url", ("memory://fuzz",)),
    (r"manifest|yaml", ("name: m\nseed: 1\nstages: [{name: a, command: [python, -c, pass]}]\n",)),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf)


class Messages:
    """Makes messages of any type.

    Args:
        seed: the same seed makes the same messages.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._plausible = 0.0

    def bytes(self) -> bytes:
        """Bytes that mostly are no message at all."""
        return self.random.randbytes(self.random.choice((1, 2, 5, 20, 200, 3000)))

    def message(self, descriptor: Descriptor, depth: int = 0) -> Message:
        """A message with some fields set."""
        message = GetMessageClass(descriptor)()
        if depth == 0:
            self._plausible = self.random.choice((0.0, 0.7, 0.95, 1.0))
        share = self.random.choice((0.0, 0.3, 0.7, 1.0, 1.0)) if depth == 0 else 0.9
        for field in descriptor.fields:
            if self.random.random() < share:
                self._fill(message, field, depth)
        return message

    def _fill(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        if field.message_type is not None and depth >= MAX_DEPTH:
            return
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entries = getattr(message, field.name)
            key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
            for _ in range(self.random.randint(0, MAX_REPEATED)):
                if value.message_type is not None:
                    entries[self._scalar(key)].CopyFrom(self.message(value.message_type, depth + 1))
                else:
                    entries[self._scalar(key)] = self._scalar(value)
        elif field.is_repeated:
            values = getattr(message, field.name)
            for _ in range(self.random.randint(0, MAX_REPEATED)):
                if field.message_type is not None:
                    values.add().CopyFrom(self.message(field.message_type, depth + 1))
                else:
                    values.append(self._scalar(field))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(self.message(field.message_type, depth + 1))
        else:
            setattr(message, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        choice = self.random
        if choice.random() < self._plausible and (plausible := self._likely(field)) is not None:
            return plausible
        if field.type in INT_BITS:
            low, high = INT_BITS[field.type]
            return choice.choice((0, 1, 2, 100, max(low, -1), low, high, choice.randint(low, high)))
        match field.type:
            case F.TYPE_BOOL:
                return choice.random() < 0.5
            case F.TYPE_ENUM:
                numbers = [value.number for value in field.enum_type.values]
                return choice.choice([*numbers, *numbers, 77, -5])
            case F.TYPE_DOUBLE:
                return choice.choice((*FLOATS, choice.uniform(-1e6, 1e6)))
            case F.TYPE_FLOAT:
                return choice.choice((0.0, 1.0, -1.0, 3e38, math.nan, math.inf))
            case F.TYPE_BYTES:
                return choice.choice(
                    (b"", b"\0", choice.randbytes(100), b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff" * 4)
                )
            case _:
                return choice.choice(WORDS)

    def _likely(self, field: FieldDescriptor) -> Any:
        """A value such a field would hold in earnest; None when there is no telling."""
        choice = self.random
        if field.type in INT_BITS:
            return choice.choice((0, 1, 2, 4))
        match field.type:
            case F.TYPE_ENUM:
                return choice.choice([value.number for value in field.enum_type.values][1:] or [0])
            case F.TYPE_DOUBLE | F.TYPE_FLOAT:
                return choice.choice((0.0, 0.5, 1.0))
            case F.TYPE_BYTES:
                return choice.choice((b"onnx", arrow_stream(), b'{"flight_id": "1", "late": true}'))
            case F.TYPE_STRING:
                return next((choice.choice(words) for pattern, words in HINTS if re.search(pattern, field.name)), None)
        return None


@cache
def arrow_stream() -> bytes:
    """A good Arrow IPC stream with columns a contract might have."""
    table = pa.table({"flight_id": ["1", "2"], "late": [True, False], "n": pa.array([1, None], pa.int64())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
