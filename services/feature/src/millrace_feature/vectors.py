"""Embeddings: features that are lists of numbers, packed into bytes inside the service and unpacked at its edges.

A packed vector is its numbers one after the other, low byte first: 4 bytes each for Feast's Array(Float32), 8 for Array(Float64). So an
online row of 768 numbers takes 3 KB instead of 24, the stream, the lake and the training set have the same bits, and rows of equal time are
ordered by the same bytes on every side. What is no vector of the field's length, or holds a null or a number that is not finite, is missing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from millrace_feature.plan import VectorField
from millrace_feature.tiles import Floats

PIECE_NUMBERS = 1 << 30
"""Numbers of one Arrow list array; its offsets have 32 bits."""
Numbers = NDArray[Any]
"""Of float32 or float64."""


def packed_columns(table: pa.Table, fields: Iterable[VectorField]) -> tuple[pa.Table, Mapping[str, int]]:
    """(`table` with its vectors packed, how many values of each were no vectors)."""
    bad: dict[str, int] = {}
    for field in fields:
        place = table.column_names.index(field.feature)
        column, bad[field.feature] = pack(table.column(place), field)
        table = table.set_column(place, field.feature, column)
    return table, bad


def pack(column: pa.ChunkedArray | pa.Array, field: VectorField) -> tuple[pa.Array, int]:
    """(the column as large binary, null where there is no vector; how many values that are not null were no vectors)."""
    lists = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) and column.num_chunks else column
    rows, given = len(column), len(column) - column.null_count
    if not rows or not given or not _is_list(column.type):
        return pa.nulls(rows, pa.large_binary()), given
    lists = lists.cast(pa.large_list(pa.float64() if field.is_wide else pa.float32()), safe=False)
    offsets = np.asarray(lists.offsets.to_numpy(), np.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    numbers = np.ascontiguousarray(lists.values.slice(first, last - first).to_numpy(zero_copy_only=False), dtype(field))
    good = np.asarray(lists.is_valid().to_numpy(zero_copy_only=False), np.bool_)
    if field.length:
        good &= np.diff(offsets) == field.length
    strange = ~np.isfinite(numbers)  # a null has become NaN
    if strange.any():
        before = np.r_[0, np.cumsum(strange)]
        good &= before[offsets[1:] - first] == before[offsets[:-1] - first]
    places = (offsets - first) * numbers.itemsize
    buffers = [pa.array(good).buffers()[1], pa.py_buffer(places), pa.py_buffer(numbers)]
    return pa.Array.from_buffers(pa.large_binary(), rows, buffers), given - int(good.sum())


def unpack(content: bytes, *, is_wide: bool) -> list[float]:
    """The numbers of one packed vector."""
    found: list[float] = np.frombuffer(content, "<f8" if is_wide else "<f4").tolist()
    return found


def unpacked(column: pa.ChunkedArray | pa.Array, field: VectorField) -> pa.ChunkedArray:
    """What `pack` made, as lists again."""
    size = dtype(field).itemsize
    kind = pa.float64() if field.is_wide else pa.float32()
    pieces = []
    for chunk in _chunks(column):
        rows = max(1, PIECE_NUMBERS // max(1, field.length))
        for start in range(0, len(chunk), rows):
            offsets, content = _content(chunk.slice(start, rows))
            values = pa.Array.from_buffers(kind, len(content) // size, [None, pa.py_buffer(content)])
            nulls = pa.array(np.asarray(chunk.slice(start, rows).is_null().to_numpy(zero_copy_only=False)))
            places = pa.array((offsets // size).astype(np.int32))
            pieces.append(pa.ListArray.from_arrays(places, values, mask=nulls))
    return pa.chunked_array(pieces, pa.list_(kind))


def elements(column: pa.ChunkedArray | pa.Array, field: VectorField) -> Floats:
    """The numbers by their place in the vector, shape (length, rows); NaN where there is no vector. The field's length must be fixed."""
    out = np.full((field.length, len(column)), np.nan)
    row = 0
    for chunk in _chunks(column):
        there = np.asarray(chunk.is_valid().to_numpy(zero_copy_only=False), np.bool_)
        _offsets, content = _content(chunk.drop_null())
        numbers = np.frombuffer(content, dtype(field)).reshape(-1, field.length)
        out[:, row : row + len(chunk)][:, there] = numbers.T
        row += len(chunk)
    return out


def dtype(field: VectorField) -> np.dtype[Any]:
    """How the field's numbers are packed."""
    return np.dtype("<f8") if field.is_wide else np.dtype("<f4")


def _chunks(column: pa.ChunkedArray | pa.Array) -> list[pa.Array]:
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return [chunk.cast(pa.large_binary()) for chunk in chunks]


def _content(chunk: pa.Array) -> tuple[NDArray[np.int64], memoryview]:
    """(where each value begins, and the last ends, in the content; the content)."""
    _validity, places, content = chunk.buffers()
    offsets = np.frombuffer(places, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    if content is None or not len(chunk):
        return np.zeros(len(chunk) + 1, np.int64), memoryview(b"")
    first, last = int(offsets[0]), int(offsets[-1])
    return offsets - first, memoryview(content)[first:last]


def _is_list(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
