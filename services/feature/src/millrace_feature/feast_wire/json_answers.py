"""Answers as JSON, byte for byte what Feast's server would say but for spaces and the spelling of numbers.

Features of one view share statuses and event times, so these are written once a view; numbers are written by msgspec, a list at a time.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from millrace_feature.feast_wire.layout import statuses
from millrace_feature.feast_wire.reads import Answer
from millrace_feature.feast_wire.selection import Block
from millrace_feature.feast_wire.values import CONVERTERS, NOT_FOUND, OUTSIDE_MAX_AGE, PRESENT, doubles
from millrace_feature.float_parts import FloatPart
from millrace_feature.serving import Part

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ZERO = b'"1970-01-01T00:00:00Z"'
_NAMES = {PRESENT: b'"PRESENT"', NOT_FOUND: b'"NOT_FOUND"', OUTSIDE_MAX_AGE: b'"OUTSIDE_MAX_AGE"'}
_encode = msgspec.json.Encoder().encode
_UNSPLIT = frozenset({"STRING", "FLOAT_LIST", "DOUBLE_LIST"})
"""Kinds whose JSON may hold a comma."""


def to_json(answer: Answer) -> bytes:
    """The body of an answer."""
    results = [_key(values) for _name, _kind, values in answer.given.keys]
    results += [_block(block, answer.parts[block.part]) for block in answer.selection.blocks]
    names = [name for name, _kind, _values in answer.given.keys]
    metadata = b'{"feature_names":' + _encode([*names, *answer.selection.names])
    if answer.with_versions and answer.selection.views:
        metadata += b',"feature_view_metadata":' + _encode([{"name": view} for view in answer.selection.views])
    return b'{"results":[' + b",".join(results) + b'],"metadata":' + metadata + b"}}"


def _key(values: Sequence[Any]) -> bytes:
    return b'{"values":' + _encode(values) + _tail(b'"PRESENT"', _ZERO, len(values))


def _tail(status: bytes, time: bytes, count: int) -> bytes:
    return (
        b',"statuses":[' + b",".join([status] * count) + b'],"event_timestamps":[' + b",".join([time] * count) + b"]}"
    )


def _block(block: Block, part: Part | FloatPart) -> bytes:
    """The results of a block, joined by commas."""
    if len(part.values) == 1:
        row = part.values[0]
        status = PRESENT if row is not None else OUTSIDE_MAX_AGE if part.expired else NOT_FOUND
        tail = _tail(_NAMES[status], _time(part.times_us[0]), 1)
        texts: Iterable[bytes] = [b"[null]"] * len(block.names) if row is None else _single(block, block.picker(row))
    elif isinstance(part, FloatPart) and block.is_all_double:
        tail = _tails(part)
        texts = [_list("DOUBLE", column) for column in block.picker(part.table.T.tolist())]
    else:
        tail = _tails(part)
        nothing = (None,) * len(block.names)
        picked = [nothing if values is None else block.picker(values) for values in part.values]
        texts = [_list(kind, column) for kind, column in zip(block.kinds, zip(*picked, strict=True), strict=True)]
    return b'{"values":' + (tail + b',{"values":').join(texts) + tail


def _tails(part: Part | FloatPart) -> bytes:
    marks = b",".join([_NAMES[status] for status in statuses(part)])
    times = b",".join([_time(time_us) for time_us in part.times_us])
    return b',"statuses":[' + marks + b'],"event_timestamps":[' + times + b"]}"


def _single(block: Block, row: Sequence[Any]) -> list[bytes]:
    """The one value of each feature, each as a list."""
    if block.is_all_double:
        values: list[Any] = doubles(row)
    elif _UNSPLIT.isdisjoint(block.kinds):
        values = [CONVERTERS[kind]((value,))[0] for kind, value in zip(block.kinds, row, strict=True)]
    else:
        return [_list(kind, (value,)) for kind, value in zip(block.kinds, row, strict=True)]
    text = _encode(values)
    if b"null" in text and any(_is_infinite(value) for value in values):
        return [_list("DOUBLE", (value,)) if _is_infinite(value) else _encode([value]) for value in values]
    return [b"[" + one + b"]" for one in text[1:-1].split(b",")]


def _list(kind: str, column: Sequence[Any]) -> bytes:
    values = CONVERTERS[kind](column)
    text = _encode(values)
    if b"null" in text and any(_is_infinite(value) for value in values):
        return _encode([_infinity(value) if _is_infinite(value) else value for value in values])
    return text


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _infinity(value: float) -> str:
    """As protobuf's JSON says it, and Feast with it."""
    return "Infinity" if value > 0 else "-Infinity"


def _time(time_us: int | None) -> bytes:
    return _ZERO if time_us is None else _quoted(time_us)


@functools.lru_cache(maxsize=4096)
def _quoted(time_us: int) -> bytes:
    return b'"' + stamp(time_us).encode() + b'"'


def stamp(time_us: int) -> str:
    """RFC 3339 with as many digits as are needed in groups of three."""
    precision = "seconds" if not time_us % 1_000_000 else "milliseconds" if not time_us % 1000 else "microseconds"
    instant = _EPOCH + timedelta(microseconds=time_us)
    return instant.replace(tzinfo=None).isoformat(timespec=precision) + "Z"
