"""A lake that hangs: streams wait, unary writes are refused by the limit's name, and what is queued stays below the limits."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_ingestion import metrics
from millrace_ingestion.lake import LakeTable
from millrace_kit.errors import MillraceError

from .harness import batch, records, serving

MIB = 1 << 20
ROWS = 5_000
BATCHES = 120


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Appends wait until it is set."""
    opened = threading.Event()
    append = LakeTable.append

    def slow(self, *arguments):
        assert opened.wait(120)
        return append(self, *arguments)

    monkeypatch.setattr(LakeTable, "append", slow)
    yield opened
    opened.set()


def queued() -> tuple[float, float]:
    return metrics.QUEUED_BATCHES._value.get(), metrics.QUEUED_BYTES._value.get()


async def settled() -> tuple[float, float]:
    """What is queued once it does not change for a while."""
    last, same = queued(), 0
    async with asyncio.timeout(60):
        while same < 20 or last[0] == 0:
            await asyncio.sleep(0.02)
            same = same + 1 if queued() == last else 0
            last = queued()
    return last


async def test_a_stream_waits_for_a_slow_lake(tmp_path: Path, gate: threading.Event) -> None:
    sent = 0

    async def requests() -> AsyncIterator[pb.WriteStreamRequest]:
        nonlocal sent
        for offset in range(1, BATCHES + 1):
            sent += 1
            yield pb.WriteStreamRequest(batch=batch(offset, records(offset * ROWS, ROWS)))

    async with serving(tmp_path, max_queued_mib=2, stream_window=8) as client:
        await client.register()
        answers = client.stub.WriteStream(requests())
        landing = asyncio.create_task(_count(answers))
        try:
            batches, size = await settled()
            sent_then = sent
        finally:
            refused = await asyncio.gather(client.write(1, records(0, ROWS), source="other"), return_exceptions=True)
            gate.set()
        # The batch that is being decoded may take its room beyond the limit.
        assert 0 < size <= 3 * MIB
        # Besides the window: the one whose answer is awaited, and the one that waits for a place in the window.
        assert batches <= 8 + 2
        # gRPC's own buffers hold some more, not all.
        assert sent_then < BATCHES / 2
        (error,) = (MillraceError.from_rpc(e) for e in refused if isinstance(e, grpc.aio.AioRpcError))
        assert (error.code, error.metadata["limit"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "max_queued_mib")
        assert await landing == BATCHES
        assert client.lake().num_rows == BATCHES * ROWS
        assert queued() == (0, 0)


async def _count(answers: AsyncIterator[pb.WriteStreamResponse]) -> int:
    return len([answer async for answer in answers])
