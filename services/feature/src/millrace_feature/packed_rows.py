"""One row of a newest-row view as bytes: its event time, a fingerprint of its types, and its values.

    time   8 bytes   microseconds since the epoch, signed, high byte first (Redis's scripts compare it)
    kinds  2 bytes + one byte a value, or one for all of them where they are alike
    fixed  8 bytes a value, low byte first: floats as they are (NaN where missing), integers, truth values and instants as integers
    tail   what has no fixed size (texts, lists), as MessagePack

Types are the row's own, so a contract whose column changes from integers to fractions leaves old rows as they were written, and a reader
sees at one comparison whether a row is what it expects: rows of floats alone, the usual case, become one array without looking at values.
"""

import functools
import struct
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np
from numpy.typing import NDArray

from millrace_feature.rows import EPOCH, Scalar
from millrace_feature.tiles import Floats, Ints

_HEAD = struct.Struct(">qH")
_TIME = struct.Struct(">q")
_FLOAT, _INTEGER, _TRUTH, _INSTANT, _OTHER = b"dqbtv"
_CODES = {float: "d", type(None): "d", int: "q", bool: "b", datetime: "t"}
_FLOATS = b"\x00\x01d"
"""Kinds of a row of floats alone."""
_MISSING = float("nan")
_INT64 = range(-(1 << 63), 1 << 63)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list).decode


def pack_row(time_us: int, values: Sequence[Scalar]) -> bytes:
    """A row as bytes."""
    codes = [_CODES.get(type(value), "v") for value in values]
    fixed: list[float | int] = []
    tail: list[Scalar] = []
    for i, value in enumerate(values):
        if codes[i] == "v" or (codes[i] == "q" and value not in _INT64):
            codes[i] = "v"
            tail.append(value)
        elif value is None:
            fixed.append(_MISSING)
        elif isinstance(value, datetime):
            fixed.append((value.astimezone(UTC) - EPOCH) // timedelta(microseconds=1))
        else:
            assert isinstance(value, int | float)
            fixed.append(value)
    kinds = "".join(codes)
    if len(set(codes)) == 1:
        kinds = codes[0]
    layout = "<" + "".join("d" if code == "d" else "q" for code in codes if code != "v")
    head = _HEAD.pack(time_us, len(kinds)) + kinds.encode()
    return head + struct.pack(layout, *fixed) + (_encode(tail) if tail else b"")


def bound_of(time_us: int) -> bytes:
    """Sorts before every packed row later than `time_us` and not before any other, as bytes; for instants after 1970."""
    return _TIME.pack(time_us + 1)


def unpack_row(packed: bytes) -> tuple[int, tuple[Scalar, ...]]:
    """(event time, values) of what `pack_row` wrote."""
    time_us, size = _HEAD.unpack_from(packed)
    kinds = packed[_HEAD.size : _HEAD.size + size]
    start = _HEAD.size + size
    if kinds == b"d":
        floats = _floats((len(packed) - start) // 8).unpack_from(packed, start)
        return time_us, tuple([None if value != value else value for value in floats])  # noqa: PLR0124 - NaN is not itself
    if kinds == b"v":
        return time_us, tuple(_decode(packed[start:]))
    if size == 1:
        kinds *= (len(packed) - start) // 8
    layout = _mixed(kinds)
    fixed = iter(layout.unpack_from(packed, start))
    rest = packed[start + layout.size :]
    tail = iter(_decode(rest) if rest else ())
    return time_us, tuple([next(tail) if kind == _OTHER else _value(kind, next(fixed)) for kind in kinds])


def _value(kind: int, value: float) -> Scalar:
    if kind == _FLOAT:
        return None if value != value else value  # noqa: PLR0124
    if kind == _TRUTH:
        return bool(value)
    if kind == _INSTANT:
        return EPOCH + timedelta(microseconds=value)
    return value


@functools.lru_cache(maxsize=4096)
def _floats(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}d")


@functools.lru_cache(maxsize=4096)
def _mixed(kinds: bytes) -> struct.Struct:
    return struct.Struct("<" + "".join("d" if kind == _FLOAT else "q" for kind in kinds if kind != _OTHER))


class FloatRows:
    """Reads rows of `width` floats as arrays.

    Args:
        width: values a row.
    """

    def __init__(self, width: int) -> None:
        self._type = np.dtype([("time", ">i8"), ("kinds", "u1", len(_FLOATS)), ("values", "<f8", width)])
        self._kinds = np.frombuffer(_FLOATS, np.uint8)
        self.absent = _HEAD.pack(NO_ROW, 1) + b"d" + struct.pack("<d", _MISSING) * width
        """Stands for a row that is not there."""

    def read(self, packed: Iterable[bytes | None]) -> tuple[Ints, Floats] | None:
        """(event times, values: [rows, width]); None unless every row is one of `width` floats or not there (`NO_ROW`, NaN)."""
        rows = [row or self.absent for row in packed]
        content = b"".join(rows)
        size = self._type.itemsize
        if len(content) != size * len(rows) or len(max(rows, key=len)) != size:
            return None
        found: NDArray[np.void] = np.frombuffer(content, self._type)
        if (found["kinds"] != self._kinds).any():
            return None
        return found["time"].astype(np.int64), found["values"]


NO_ROW = -(1 << 63)
"""Event time of a row that is not there."""
