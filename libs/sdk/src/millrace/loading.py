"""Bulk loads from this machine: files read here, in chunks, and written through one stream.

A file is a producer of its own, named by its place, size and time of change; its offset is the number of its records that landed. So a load
that was killed goes on where it was when it is run again, and a file that landed is not sent a second time.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_kit.errors import MillraceError
from millrace_kit.record_files import Chunk, ChunkLimits, RecordFile, read_chunks

from millrace.areas.data import arrow_ipc
from millrace.client import Client
from millrace.transport import LONG_TIMEOUT_S, call, stream

LIMITS = ChunkLimits(records=20_000, bytes=4 << 20)
# Attempts without a batch landing between them, and the waits between, which double.
ATTEMPTS = 10
RETRY_MIN_S, RETRY_MAX_S = 0.2, 10.0
MAX_FILES = 100_000
_KINDS = {
    pb.COLUMN_TYPE_STRING: "string",
    pb.COLUMN_TYPE_INT64: "int64",
    pb.COLUMN_TYPE_DOUBLE: "double",
    pb.COLUMN_TYPE_BOOL: "bool",
    pb.COLUMN_TYPE_TIMESTAMP: "timestamp",
    pb.COLUMN_TYPE_FLOAT_LIST: "float_list",
}
Report = Callable[[pb.WriteResponse, int], None]
"""Told each batch that landed, and about how many bytes of the file were read for it."""


@dataclass
class Loaded:
    """What became of one file."""

    url: str
    skipped: int
    """Records that had landed before this load."""
    accepted: int = 0
    duplicates: int = 0
    rejected: int = 0
    quarantined: int = 0


def columns_of(client: Client, contract: str) -> dict[str, str]:
    """Type of each column of a contract, for `read_chunks`.

    Raises:
        MillraceError: there is no such contract, or ingestion does not answer.
    """
    answer: pb.GetContractResponse = call(client.ingestion.stub.GetContract, pb.GetContractRequest(name=contract))
    return {column.name: _KINDS[column.type] for column in answer.contract.columns}


def load_file(
    client: Client,
    contract: str,
    file: RecordFile,
    columns: dict[str, str],
    *,
    report: Report = lambda _answer, _read: None,
    limits: ChunkLimits = LIMITS,
    wait: Callable[[float], None] = time.sleep,
) -> Loaded:
    """Write what has not landed of a file.

    Args:
        client: of the installation.
        contract: what the records follow.
        file: from `find_files`.
        columns: from `columns_of`.
        report: told of each batch.
        limits: of a batch.
        wait: between attempts.

    Raises:
        InvalidArgumentError: the file cannot be read; names it and the row group or line.
        MillraceError: ingestion refused, or did not answer in `ATTEMPTS` attempts in a row.
        OSError: the file's store does not answer.
    """
    source = f"load/{file.identity}"
    position = client.sources.position(contract, source)
    loaded = Loaded(file.url, position)
    failures, retry_s = 0, RETRY_MIN_S
    while True:
        try:
            chunks = read_chunks(file, columns, limits, after=position)
            for answer, read in _write(client, pb.RecordBatch(contract=contract, source=source), chunks):
                position = answer.offset
                failures, retry_s = 0, RETRY_MIN_S
                _count(loaded, answer)
                report(answer, read)
        except MillraceError as error:
            failures += 1
            if error.code is not grpc.StatusCode.UNAVAILABLE or failures >= ATTEMPTS:
                raise
            wait(retry_s)
            retry_s = min(RETRY_MAX_S, retry_s * 2)
        else:
            return loaded


def _write(client: Client, target: pb.RecordBatch, chunks: Iterator[Chunk]) -> Iterator[tuple[pb.WriteResponse, int]]:
    """One stream of chunks; `target` names contract and source."""
    problems: list[Exception] = []
    read: dict[int, int] = {}

    def requests() -> Iterator[pb.WriteStreamRequest]:
        try:
            for chunk in chunks:
                batch = pb.RecordBatch(contract=target.contract, source=target.source, offset=chunk.end)
                if chunk.table is not None:
                    batch.arrow_ipc = arrow_ipc(chunk.table)
                else:
                    batch.json_lines = chunk.json_lines or b""
                read[chunk.end] = chunk.read_bytes
                yield pb.WriteStreamRequest(batch=batch)
        except Exception as error:
            problems.append(error)

    for answer in stream(client.ingestion.stub.WriteStream, requests(), timeout_s=LONG_TIMEOUT_S):
        yield answer.result, read.pop(answer.result.offset, 0)
    if problems:
        raise problems[0]


def _count(loaded: Loaded, answer: pb.WriteResponse) -> None:
    loaded.accepted += answer.accepted
    loaded.duplicates += answer.duplicates
    loaded.rejected += answer.rejected
    loaded.quarantined += answer.quarantined
