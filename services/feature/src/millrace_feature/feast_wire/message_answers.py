"""Answers as the bytes of `feast.serving.GetOnlineFeaturesResponse`, written without making the message.

Making it costs 316 µs for 50 features and 9 ms for 100 rows of them (protobuf's own C code); these bytes cost a tenth and parse to the
same message. Doubles have a fixed size, so a whole column is one array operation; the rest is written value by value.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from millrace_feature.feast_wire.layout import columns, statuses
from millrace_feature.feast_wire.reads import Answer
from millrace_feature.feast_wire.selection import Block
from millrace_feature.feast_wire.values import PRESENT, doubles
from millrace_feature.float_parts import FloatPart, doubles_fields, time_fields
from millrace_feature.serving import Part
from millrace_feature.wire_format import sized, varint

_EMPTY = b"\x0a\x00"
"""A `Value` with nothing set."""
_ROW = np.dtype([("head", "S3"), ("value", "<f8")])
_DOUBLE_HEAD = b"\x0a\x09\x29"
_PACK_DOUBLE = struct.Struct("<3sd").pack
_PACK_FLOAT = struct.Struct("<f").pack
_NO_TIME = b"\x1a\x00"


def _text(value: str) -> bytes:
    return sized(b"\x12", value.encode())


def _doubles_list(value: Sequence[float]) -> bytes:
    return sized(b"\x7a", sized(b"\x0a", np.asarray(value, "<f8").tobytes()))


def _floats_list(value: Sequence[float]) -> bytes:
    return sized(b"\x82\x01", sized(b"\x0a", np.asarray(value, "<f4").tobytes()))


_WRITERS: dict[str, Callable[[Any], bytes]] = {
    "STRING": _text,
    "INT32": lambda value: b"\x18" + varint(value),
    "INT64": lambda value: b"\x20" + varint(value),
    "DOUBLE": lambda value: b"\x29" + struct.pack("<d", value),
    "FLOAT": lambda value: b"\x35" + _PACK_FLOAT(value),
    "BOOL": lambda value: b"\x38\x01" if value else b"\x38\x00",
    "UNIX_TIMESTAMP": lambda value: b"\x40" + varint(value),
    "FLOAT_LIST": _floats_list,
    "DOUBLE_LIST": _doubles_list,
}
"""The content of a `Value` by Feast's type."""


def to_message(answer: Answer) -> bytes:
    """The bytes of an answer."""
    names = [name for name, _kind, _values in answer.given.keys]
    listed = b"".join(sized(b"\x0a", name.encode()) for name in (*names, *answer.selection.names))
    metadata = sized(b"\x0a", listed)
    if answer.with_versions:
        metadata += b"".join(sized(b"\x12", sized(b"\x0a", view.encode())) for view in answer.selection.views)
    out = [sized(b"\x0a", metadata)]
    for _name, kind, values in answer.given.keys:
        content = b"".join(_value(kind, value) for value in values)
        out.append(sized(b"\x12", content + _tail([PRESENT] * len(values), _NO_TIME * len(values))))
    out += [_block(block, answer.parts[block.part]) for block in answer.selection.blocks]
    return b"".join(out)


def _value(kind: str, value: Any) -> bytes:
    if value is None or value != value:  # noqa: PLR0124 - NaN is not itself
        return _EMPTY
    return sized(b"\x0a", _WRITERS[kind](value))


def _tail(marks: Sequence[int], times: bytes) -> bytes:
    return sized(b"\x12", bytes(marks)) + times


def _time(time_us: int | None) -> bytes:
    if time_us is None:
        return _NO_TIME
    seconds, rest = divmod(time_us, 1_000_000)
    content = (b"\x08" + varint(seconds) if seconds else b"") + (b"\x10" + varint(rest * 1000) if rest else b"")
    return sized(b"\x1a", content)


def _block(block: Block, part: Part | FloatPart) -> bytes:
    """The results of a block."""
    times = time_fields(part.instants) if isinstance(part, FloatPart) else None
    if times is None:
        times = b"".join([_time(time_us) for time_us in part.times_us])
    tail = _tail(statuses(part), times)
    if isinstance(part, FloatPart) and block.is_all_double:
        return b"".join([sized(b"\x12", one) for one in doubles_fields(np.asarray(block.picker(part.table.T)), tail)])
    if isinstance(part, Part) and block.is_all_double and None not in part.values:
        return _doubles(block, part, tail)
    found = columns(block, part)
    out = []
    for kind, values in zip(block.kinds, found.values, strict=True):
        content = b"".join([_value(kind, value) for value in values]) + tail
        out.append(sized(b"\x12", content))
    return b"".join(out)


def _doubles(block: Block, part: Part, tail: bytes) -> bytes:
    """A block of doubles whose rows are all there: every result has the same length unless values are missing."""
    rows = len(part.values)
    head = b"\x12" + varint(len(tail) + 11 * rows)
    if rows == 1:
        values = doubles(block.picker(part.values[0]))
        if any(value != value for value in values):  # noqa: PLR0124
            contents = [_value("DOUBLE", value) + tail for value in values]
            return b"".join([sized(b"\x12", content) for content in contents])
        end = tail + head
        return head + end.join([_PACK_DOUBLE(_DOUBLE_HEAD, value) for value in values]) + tail
    table = np.array([doubles(block.picker(values)) for values in part.values], np.float64)
    cells = np.empty(table.shape[::-1], _ROW)
    cells["head"] = _DOUBLE_HEAD
    cells["value"] = table.T
    gaps: list[bool] = np.logical_or.reduce(np.isnan(table)).tolist()
    out = []
    for feature, has_gap in enumerate(gaps):
        if not has_gap:
            out.append(head + cells[feature].tobytes() + tail)
        else:
            content = b"".join([_value("DOUBLE", value) for value in table[:, feature].tolist()]) + tail
            out.append(sized(b"\x12", content))
    return b"".join(out)
