"""Files of records, read in chunks that can be taken up again: Parquet, CSV and JSON lines, on local disk or an object store.

A chunk ends after a number of records of its file, and reading goes on after any such number. One file's memory is bounded by a chunk
(and for Parquet by a page of each column), whatever the file's size. CSV has no types: a cell becomes what the contract's column is, and
where one cannot, the chunk is sent as JSON lines with that cell as it stands, so that the contract's checks say what is wrong with it.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from millrace_kit.content import open_files
from millrace_kit.errors import InvalidArgumentError

PARQUET, CSV, JSON_LINES = "parquet", "csv", "json_lines"
FORMATS = (PARQUET, CSV, JSON_LINES)
_ENDINGS = {
    ".parquet": PARQUET, ".pq": PARQUET, ".csv": CSV, ".json": JSON_LINES, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES,
}  # fmt: skip
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
# What the CSV reader and the line reader take from the file at once.
BLOCK_BYTES = 4 << 20
# Microseconds; the only type of time a contract has.
_TIMESTAMP = pa.timestamp("us", "UTC")
_TYPES = {"int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_(), "timestamp": _TIMESTAMP}


@dataclass(frozen=True)
class RecordFile:
    """A file as it was found."""

    url: str
    size: int
    """Bytes."""
    format: str
    identity: str
    """Short digest of place, size and ETag (or time of change): another content has another one."""


@dataclass(frozen=True)
class Chunk:
    """Some records in a row; exactly one of the payloads is set."""

    end: int
    """Records of the file up to the end of this chunk."""
    table: pa.Table | None = None
    json_lines: bytes | None = None
    places: Sequence[int] = ()
    """Number of each record in its file, from 1; of JSON lines the line's."""
    read_bytes: int = 0
    """How much of the file was read for it, about; for people who wait."""


@dataclass(frozen=True)
class ChunkLimits:
    """How large a chunk may become."""

    records: int
    bytes: int


def format_of(url: str) -> str:
    """The format that a name's ending says, below a compression's.

    Raises:
        InvalidArgumentError: it says none.
    """
    name = url.lower()
    for ending in _COMPRESSIONS:
        name = name.removesuffix(ending)
    for ending, kind in _ENDINGS.items():
        if name.endswith(ending):
            return kind
    raise InvalidArgumentError(
        "path", f"{url}: its name says no format ({', '.join(_ENDINGS)}); name one of {', '.join(FORMATS)}"
    )


def find_files(pattern: str, kind: str = "", *, limit: int) -> list[RecordFile]:
    """The files that a path, a folder or a glob matches, by their names.

    Args:
        pattern: path or fsspec URL.
        kind: their format; empty takes it from each name, and leaves out files of a folder or glob that say none.
        limit: files that may match.

    Raises:
        InvalidArgumentError: more than `limit` match, or the single file's name says no format.
        OSError: the store does not answer.
    """
    fs, path = open_files(pattern)
    fs.invalidate_cache()
    single = not any(letter in path for letter in "*?[")
    if single and fs.isdir(path):
        path, single = f"{path.rstrip('/')}/**", False
    found = fs.glob(path, detail=True)
    files = []
    for name in sorted(found):
        info = found[name]
        if info["type"] != "file" or (not single and name.rpartition("/")[2].startswith((".", "_"))):
            continue
        url = fs.unstrip_protocol(name)
        try:
            named = kind or format_of(url)
        except InvalidArgumentError:
            if single:
                raise
            continue
        files.append(RecordFile(url, int(info["size"]), named, _identity(url, info)))
        if len(files) > limit:
            raise InvalidArgumentError("path", f"{pattern} matches more than {limit} files")
    return files


def _identity(url: str, info: Mapping[str, Any]) -> str:
    changed = (
        info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or info.get("created")
    )
    if isinstance(changed, datetime):
        changed = changed.isoformat()
    text = "\0".join([url, str(info["size"]), str(changed)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def unchanged(file: RecordFile) -> bool:
    """Whether the file is still the one that was found."""
    fs, path = open_files(file.url)
    fs.invalidate_cache()
    return fs.exists(path) and _identity(file.url, fs.info(path)) == file.identity


def read_chunks(
    file: RecordFile, columns: Mapping[str, str], limits: ChunkLimits, *, after: int = 0
) -> Iterator[Chunk]:
    """The records of a file after the first `after`.

    Args:
        file: as it was found.
        columns: type of each of the contract's columns (`string`, `int64`, `double`, `bool`, `timestamp`); others are not read.
        limits: of a chunk; a single record may be larger.
        after: records that are left out.

    Raises:
        InvalidArgumentError: the file cannot be read; names it and the row group or line.
        OSError: the store does not answer.
    """
    readers = {PARQUET: _parquet, CSV: _csv, JSON_LINES: _json_lines}
    yield from readers[file.format](file, columns, limits, after)


def _parquet(file: RecordFile, columns: Mapping[str, str], limits: ChunkLimits, after: int) -> Iterator[Chunk]:
    fs, path = open_files(file.url)
    group = 0
    try:
        with fs.open(path, "rb", **_plain_cache(fs)) as opened, pq.ParquetFile(opened, pre_buffer=False) as parquet:
            names = [name for name in parquet.schema_arrow.names if name in columns]
            at = 0
            total = max(1, parquet.metadata.num_rows)
            for group in range(parquet.metadata.num_row_groups):
                found = parquet.metadata.row_group(group)
                rows = found.num_rows
                if at + rows <= after:
                    at += rows
                    continue
                # Wide rows make short batches: what is decoded at once stays about a chunk.
                many = max(1, min(limits.records, limits.bytes * rows // max(1, found.total_byte_size)))
                for batch in parquet.iter_batches(many, row_groups=[group], columns=names):
                    skipped = min(max(0, after - at), batch.num_rows)
                    at += batch.num_rows
                    read = file.size * at // total
                    yield from _cut(pa.Table.from_batches([batch.slice(skipped)]), at, limits, read)
    except pa.ArrowException as error:
        raise _unreadable(file, f"row group {group}: {error}") from None


def _csv(file: RecordFile, columns: Mapping[str, str], limits: ChunkLimits, after: int) -> Iterator[Chunk]:
    with _opened(file) as (opened, raw):
        try:
            # Without threads the parser numbers its rows; quoted values may hold line ends.
            reader = pa_csv.open_csv(
                opened,
                read_options=pa_csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
                parse_options=pa_csv.ParseOptions(newlines_in_values=True),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.string()),
                    null_values=[""],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                ),
            )
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                return
            raise _unreadable(file, f"line 1: {error}") from None
        at = 0
        names = [name for name in reader.schema.names if name in columns]
        if len(set(names)) < len(names):
            raise _unreadable(file, "line 1: a column is there twice")
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            except pa.ArrowException as error:
                raise _unreadable(file, f"after record {at}: {error}") from None
            skipped = min(max(0, after - at), batch.num_rows)
            texts = pa.Table.from_batches([batch]).select(names).slice(skipped)
            start, at = at + skipped, at + batch.num_rows
            for first in range(0, texts.num_rows, limits.records):
                part = texts.slice(first, limits.records)
                end = start + first + part.num_rows
                typed = _typed(part, columns)
                if typed is not None:
                    yield from _cut(typed, end, limits, raw.tell())
                else:
                    places = range(end - part.num_rows + 1, end + 1)
                    yield Chunk(end, None, _as_lines(part, columns), places, raw.tell())


def _typed(texts: pa.Table, columns: Mapping[str, str]) -> pa.Table | None:
    """The columns in their types; None when a cell is not of its type."""
    arrays = []
    for name in texts.column_names:
        column = texts.column(name)
        kind = _TYPES.get(columns[name])
        try:
            arrays.append(column if kind is None else pc.cast(column, kind))
        except pa.ArrowInvalid:
            if kind != _TIMESTAMP:
                return None
            try:
                arrays.append(pc.cast(column, pa.timestamp("us")))  # no offset is UTC
            except pa.ArrowInvalid:
                return None
    return pa.table(arrays, names=texts.column_names)


def _as_lines(texts: pa.Table, columns: Mapping[str, str]) -> bytes:
    return b"\n".join(
        json.dumps({name: _cell(text, columns[name]) for name, text in row.items()}, allow_nan=False).encode()
        for row in texts.to_pylist()
    )


def _cell(text: str | None, kind: str) -> object:
    """A cell as its column's type, or as it stands."""
    if text is None:
        return None
    try:
        match kind:
            case "int64":
                return int(text)
            case "double":
                number = float(text)
                if math.isnan(number):
                    return "NaN"
                return number if math.isfinite(number) else "Infinity" if number > 0 else "-Infinity"
            case "bool":
                return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    except ValueError:
        return text
    return text


def _json_lines(file: RecordFile, columns: Mapping[str, str], limits: ChunkLimits, after: int) -> Iterator[Chunk]:
    """Lines are passed on as they are; empty ones are left out and count, so that a position is a number of lines."""
    del columns
    with _opened(file) as (opened, raw):
        at = size = 0
        lines: list[bytes] = []
        places: list[int] = []
        for line in _lines(opened, file, limits.bytes):
            at += 1
            if at <= after or not line.strip():
                continue
            if lines and (len(lines) >= limits.records or size + len(line) > limits.bytes):
                yield Chunk(at - 1, None, b"\n".join(lines), places, raw.tell())
                lines, places, size = [], [], 0
            lines.append(line)
            places.append(at)
            size += len(line) + 1
        if lines:
            yield Chunk(at, None, b"\n".join(lines), places, raw.tell())


def _lines(opened: IO[bytes], file: RecordFile, limit: int) -> Iterator[bytes]:
    rest = b""
    number = 0
    while True:
        try:
            block = opened.read(BLOCK_BYTES)
        except (pa.ArrowException, OSError, EOFError) as error:
            if isinstance(error, OSError) and not _is_broken_stream(error):
                raise
            raise _unreadable(file, f"after line {number}: {error}") from None
        if not block:
            if rest:
                yield rest
            return
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
        number += len(whole)
        if len(rest) > limit:
            raise _unreadable(file, f"line {number + 1} is longer than {limit} bytes")


def _is_broken_stream(error: OSError) -> bool:
    """Whether it is the decompression that failed, which pyarrow reports as OSError without a number."""
    return error.errno is None


@contextlib.contextmanager
def _opened(file: RecordFile) -> Iterator[tuple[Any, Any]]:
    """The file's content as a stream, decompressed, and the file itself."""
    fs, path = open_files(file.url)
    compression = next((kind for ending, kind in _COMPRESSIONS.items() if file.url.lower().endswith(ending)), None)
    with fs.open(path, "rb", **_plain_cache(fs)) as opened:
        if compression is None:
            yield opened, opened
            return
        with pa.CompressedInputStream(pa.PythonFile(opened, mode="r"), compression) as stream:
            yield stream, opened


def _plain_cache(fs: Any) -> dict[str, object]:
    """Options that bound what a remote file keeps in memory."""
    protocols: Sequence[str] = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return {} if {"file", "local", "memory"} & set(protocols) else {"block_size": BLOCK_BYTES}


def _cut(table: pa.Table, end: int, limits: ChunkLimits, read_bytes: int) -> Iterator[Chunk]:
    """The table as chunks; `end` is the position after its last row."""
    if table.num_rows == 0:
        return
    pieces = max(1, math.ceil(table.nbytes / limits.bytes), math.ceil(table.num_rows / limits.records))
    rows = max(1, math.ceil(table.num_rows / pieces))
    first = end - table.num_rows
    for start in range(0, table.num_rows, rows):
        part = table.slice(start, rows)
        place = first + start
        places = range(place + 1, place + part.num_rows + 1)
        yield Chunk(place + part.num_rows, part, None, places, read_bytes)


def _unreadable(file: RecordFile, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(file.url, problem, "UNREADABLE_FILE")
