"""Records that come as an Arrow IPC stream: reading bytes that nobody vouches for, then converting columns.

What is converted to what (anything else is WRONG_TYPE):
- STRING from string, large_string, string_view and dictionaries of these;
- INT64 from every integer type, where the value fits;
- DOUBLE from float16, float32, float64 and from integers up to 2^53, which are exact;
- BOOL from bool;
- TIMESTAMP from timestamps of any unit (finer than microseconds is cut off) and zone (none means UTC), and from int64 as
  microseconds since the epoch.
A column that the contract has and the batch lacks is null where it is nullable, else every record is MISSING_COLUMN. Columns that
the contract does not have are left out and counted.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from millrace_kit.errors import InvalidArgumentError, ResourceExhaustedError

from millrace_ingestion.checks import (
    MISSING_COLUMN,
    MISSING_EVENT_ID,
    NO_TIME,
    WRONG_TYPE,
    Arrival,
    Checked,
    Failure,
    Mask,
    Reject,
    Verdict,
    check_values,
    empty_column,
    settle,
)
from millrace_ingestion.contracts import ARROW_TYPES, Column, ColumnType, Contract
from millrace_ingestion.ipc_bounds import decoded_size

FIELD = "batch.arrow_ipc"
_EXACT_FLOAT = 2**53
_UTC = pa.timestamp("us", "UTC")


def read_stream(payload: bytes, *, max_rows: int, max_bytes: int) -> pa.Table:
    """The table in an Arrow IPC stream.

    Raises:
        InvalidArgumentError: the bytes are no valid stream.
        ResourceExhaustedError: it holds more than the limits allow.
    """
    batches: list[pa.RecordBatch] = []
    rows = size = 0
    try:
        if decoded_size(payload) > max_bytes:
            raise _too_large("max_batch_mib", f"the batch is larger than {max_bytes >> 20} MiB when it is decompressed")
        with pa.ipc.open_stream(pa.py_buffer(payload)) as stream:
            schema = stream.schema
            # Names are decoded here, so that none fails later: the columns', and those inside nested and zoned types.
            names, _types = schema.names, [str(kind) for kind in schema.types]
            for batch in stream:
                rows += batch.num_rows
                if rows > max_rows:
                    raise _too_large("max_batch_rows", f"the batch has more than {max_rows} records")
                # Offsets, lengths and UTF-8 as well: the kernels trust them, and a wrong one is a read outside the buffer.
                batch.validate(full=True)
                size += batch.nbytes
                if size > max_bytes:
                    raise _too_large(
                        "max_batch_mib", f"the batch is larger than {max_bytes >> 20} MiB when it is decoded"
                    )
                batches.append(batch)
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError, MemoryError) as error:
        raise InvalidArgumentError(FIELD, f"is no Arrow IPC stream: {_brief(error)}") from None
    if len(set(names)) != len(names):
        raise InvalidArgumentError(FIELD, "has two columns of one name")
    return pa.Table.from_batches(batches, schema)


def stream_bytes(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def _brief(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200].encode("utf-8", "replace").decode()


def _too_large(limit: str, message: str) -> ResourceExhaustedError:
    return ResourceExhaustedError(limit, message)


def check_table(contract: Contract, raw: pa.Table, *, max_bytes: int, arrival: Arrival = NO_TIME) -> Checked:
    """Convert and check the records of `raw`."""
    verdict = Verdict(raw.num_rows)
    columns: dict[str, pa.Array] = {}
    failed: dict[str, Mask] = {}
    for column in contract.columns:
        if column.name not in raw.column_names:
            columns[column.name] = empty_column(column, raw.num_rows)
            if not column.nullable:
                failed[column.name] = np.ones(raw.num_rows, np.bool_)
                reason = MISSING_EVENT_ID if column.name == contract.event_id_column else MISSING_COLUMN
                verdict.mark(failed[column.name], Failure(reason, column.name, "the batch has no such column"))
            continue
        given = raw.column(column.name)
        columns[column.name], wrong = convert(given, column, max_bytes=max_bytes)
        if wrong is not None and wrong.any():
            failed[column.name] = wrong
            detail = f"{given.type} does not convert to {column.type.value}"
            verdict.mark(wrong, Failure(WRONG_TYPE, column.name, detail[:200]))
    check_values(contract, columns, verdict, failed, arrival)
    table, rows, high, low = settle(contract, columns, verdict)
    return Checked(table, rows, _rejects(raw, verdict), high, low, verdict.findings, verdict.held)


def convert(given: pa.ChunkedArray, column: Column, *, max_bytes: int) -> tuple[pa.Array, Mask | None]:
    """A column in its contract's type, and which rows have a value that does not convert (they are null)."""
    try:
        return _converted(given, column, max_bytes)
    except (pa.ArrowException, ValueError):
        # An encoding Arrow itself cannot convert.
        return empty_column(column, len(given)), np.ones(len(given), np.bool_)


def _converted(given: pa.ChunkedArray, column: Column, max_bytes: int) -> tuple[pa.Array, Mask | None]:
    if pa.types.is_dictionary(given.type):
        _check_dictionary(given, max_bytes)
        given = given.cast(given.type.value_type)
    values = given.combine_chunks() if given.num_chunks != 1 else given.chunk(0)
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    kind, target = values.type, ARROW_TYPES[column.type]
    if kind == target:
        return values, None
    if pa.types.is_null(kind):
        return pa.nulls(len(values), target), None
    match column.type:
        case ColumnType.FLOAT_LIST if _is_number_list(kind):
            return values.cast(target, safe=False), None
        case ColumnType.STRING if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            return values.cast(target), None
        case ColumnType.INT64 if pa.types.is_integer(kind):
            return _bounded(values, target, 0, 2**63 - 1) if kind == pa.uint64() else (values.cast(target), None)
        case ColumnType.DOUBLE if pa.types.is_floating(kind):
            return values.cast(target), None
        case ColumnType.DOUBLE if pa.types.is_integer(kind):
            low = 0 if kind.bit_width == 64 and pa.types.is_unsigned_integer(kind) else -_EXACT_FLOAT
            return _bounded(values, target, low, _EXACT_FLOAT) if kind.bit_width == 64 else (values.cast(target), None)
        case ColumnType.TIMESTAMP if pa.types.is_timestamp(kind):
            return _microseconds(values)
        case ColumnType.TIMESTAMP if kind == pa.int64():
            return values.view(_UTC), None
        case _:
            return pa.nulls(len(values), target), np.asarray(values.is_valid().to_numpy(zero_copy_only=False), np.bool_)


def _is_number_list(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return bool(pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))


def _bounded(values: pa.Array, target: pa.DataType, low: int, high: int) -> tuple[pa.Array, Mask]:
    fits = pc.and_(
        pc.greater_equal(values, pa.scalar(low, values.type)), pc.less_equal(values, pa.scalar(high, values.type))
    )
    wrong = ~np.asarray(pc.fill_null(fits, True).to_numpy(zero_copy_only=False), np.bool_)
    kept = pc.if_else(fits, values, pa.scalar(None, values.type))
    return kept.cast(target), wrong


def _microseconds(values: pa.Array) -> tuple[pa.Array, Mask | None]:
    unit = values.type.unit
    if unit == "us":
        return values.view(_UTC), None
    if unit == "ns":
        return pc.divide(values.view(pa.int64()), 1_000).view(_UTC), None
    factor = 1_000_000 if unit == "s" else 1_000
    limit = (2**63 - 1) // factor
    numbers, wrong = _bounded(values.view(pa.int64()), pa.int64(), -limit, limit)
    return pc.multiply(numbers, factor).view(_UTC), wrong


def _check_dictionary(given: pa.ChunkedArray, max_bytes: int) -> None:
    """Refuse a dictionary whose plain form is larger than a batch may be: a few bytes can stand for gigabytes."""
    total = 0
    for chunk in given.chunks:
        kind = chunk.dictionary.type
        if pa.types.is_nested(kind) or pa.types.is_dictionary(kind):
            raise InvalidArgumentError(FIELD, "has a dictionary of nested values")
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
            lengths = pc.binary_length(chunk.dictionary).cast(pa.int64()).take(chunk.indices)
            total += pc.sum(lengths).as_py() or 0
        if total > max_bytes:
            raise _too_large(
                "max_batch_mib", f"a dictionary column is larger than {max_bytes >> 20} MiB when it is decoded"
            )


def _rejects(raw: pa.Table, verdict: Verdict) -> Sequence[Reject]:
    failed = verdict.failed()
    if not failed:
        return []
    records = records_as_json(raw, [row for row, _failure in failed])
    return [Reject(row, failure, record) for (row, failure), record in zip(failed, records, strict=True)]


def records_as_json(table: pa.Table, rows: Sequence[int]) -> list[str]:
    """Records of a table as JSON objects; what JSON lacks (NaN, exotic types) becomes a string."""
    names = table.column_names
    columns = [_plain_values(table.column(index), rows) for index in range(table.num_columns)]
    encoder = msgspec.json.Encoder(enc_hook=str)
    return [
        encoder.encode(dict(zip(names, values, strict=True))).decode()
        for values in (zip(*columns, strict=True) if columns else [()] * len(rows))
    ]


def _plain_values(values: pa.ChunkedArray, rows: Sequence[int]) -> list[Any]:
    kind = values.type
    # Arrow cannot take from, or turn into Python, every type a producer may send; such a value is replaced by its type's name.
    with contextlib.suppress(Exception):
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            values = values.cast(pa.timestamp("us", kind.tz), safe=False)
        if pa.types.is_string_view(kind):
            values = values.cast(pa.string())
        found: list[Any] = values.take(pa.array(rows, pa.int64())).to_pylist()
        if pa.types.is_floating(kind):
            return [float_as_json(value) for value in found]
        # A value that JSON cannot hold is found here, not when the record is encoded.
        msgspec.json.encode(found, enc_hook=str)
        return found
    return [str(kind)] * len(rows)


def float_as_json(value: float | None) -> float | str | None:
    """NaN and infinities by their names in protobuf's JSON mapping; JSON itself has none."""
    if value is None or np.isfinite(value):
        return value
    return "NaN" if np.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
