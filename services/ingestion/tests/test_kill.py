"""kill -9 at every step and at random moments: every acknowledged record is in the lake exactly once, and on the bus."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest
import yaml
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from millrace_ingestion.landing import STEPS
from millrace_kit.client import open_channel

from .harness import batch, bus_messages, contract, from_ipc, lake, landed, lines, records, row, settings_for

HERE = Path(__file__).parent
START_S = 60
ROWS = 20


@dataclass
class Process:
    """A real service process over one folder."""

    folder: Path
    started: int = 0
    running: subprocess.Popen[bytes] | None = None
    address: str = ""
    changes: dict[str, int] = field(default_factory=dict)

    def start(self, step: str = "", times: int = 1) -> None:
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(settings_for(self.folder, **self.changes).model_dump(mode="json")))
        self.started += 1
        file = self.folder / f"address-{self.started}"
        log = (self.folder / f"log-{self.started}").open("wb")
        command = [sys.executable, str(HERE / "crashing.py"), str(config), str(file), step, str(times)]
        self.running = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not file.exists():
            # A process that crashes while it recovers never says its address.
            if self.running.poll() == -signal.SIGKILL:
                return
            assert self.running.poll() is None, (self.folder / f"log-{self.started}").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.address = file.read_text()

    def kill(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.wait()

    def alive(self) -> bool:
        return self.running is not None and self.running.poll() is None


@pytest.fixture
def process(place: Path):
    one = Process(place)
    yield one
    one.kill()


async def call(process: Process, method: str, request):
    async with open_channel(process.address, timeout_s=20) as channel:
        return await getattr(IngestionServiceStub(channel), method)(request)


async def write_until_answered(process: Process, one: pb.RecordBatch, steps: list[str]) -> pb.WriteResponse:
    """What a client does: the same batch again until it is answered. A dead server is started again, to crash at the next of `steps`."""
    while True:
        if not process.alive():
            await asyncio.to_thread(process.start, steps.pop(0) if steps else "", 2)
        try:
            return await call(process, "Write", pb.WriteRequest(batch=one))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.02)


async def check_all(folder: Path, expected: dict[int, set[str]]) -> None:
    """`expected`: the event ids each acknowledged offset brought."""
    ids = lake(folder)["event_id"].to_pylist()
    doubled = [event for event, count in Counter(ids).items() if count > 1]
    assert not doubled, f"twice in the lake: {doubled[:5]}"
    assert set(ids) == set().union(*expected.values())
    published: dict[int, set[str]] = {}
    order: list[int] = []
    for message in await bus_messages(folder):
        value = landed(message)
        assert message.headers["event-id"] == f"flights/s/{value.source_offset}".encode()
        found = set(from_ipc(value.arrow_ipc)["event_id"].to_pylist())
        assert published.setdefault(value.source_offset, found) == found, "a second copy differs from the first"
        order.append(value.source_offset)
    assert published == {offset: ids for offset, ids in expected.items() if ids}
    first_copies = list(dict.fromkeys(order))
    assert first_copies == sorted(first_copies)


@pytest.mark.slow
async def test_a_crash_at_every_step(process: Process) -> None:
    """Each restarted process crashes at the next step, during its second group."""
    steps = [*STEPS, ""]
    process.start(steps.pop(0), times=2)
    await call(process, "RegisterContract", pb.RegisterContractRequest(contract=contract()))
    expected: dict[int, set[str]] = {}
    for offset in range(1, 2 * len(STEPS) + 2):
        bad = row(f"bad{offset}", carrier="?")
        good = [row(f"r{offset}-{i}") for i in range(ROWS)]
        payload = lines(*good, bad, row("r1-0"))
        answer = await write_until_answered(process, batch(offset, payload), steps)
        assert (answer.accepted, answer.duplicates, answer.rejected) == (ROWS, 1, 1)
        expected[offset] = {one["event_id"] for one in good}
    assert not steps, f"no crash before {steps}"
    counts = await call(process, "CountDeadLetters", pb.CountDeadLettersRequest(contract="flights"))
    assert [(c.reason, c.count) for c in counts.counts] == [("PATTERN_MISMATCH", len(expected))]
    await check_all(process.folder, expected)


@pytest.mark.slow
async def test_a_crash_of_the_recovery_itself(process: Process) -> None:
    process.start("indexed")
    await call(process, "RegisterContract", pb.RegisterContractRequest(contract=contract()))
    with pytest.raises(grpc.aio.AioRpcError):
        await call(process, "Write", pb.WriteRequest(batch=batch(1, records(0, ROWS))))
    process.running.wait()
    process.start("published")
    answer = await write_until_answered(process, batch(1, records(0, ROWS)), [])
    assert (answer.accepted, answer.replayed) == (ROWS, True)
    await check_all(process.folder, {1: {f"e{i}" for i in range(ROWS)}})


@pytest.mark.slow
async def test_random_kills_under_a_stream(process: Process) -> None:
    process.changes = {"maintain_every_commits": 3, "index_flush_ids": 50}
    process.start()
    await call(process, "RegisterContract", pb.RegisterContractRequest(contract=contract()))
    expected = {offset: {f"e{i}" for i in range((offset - 1) * ROWS, offset * ROWS)} for offset in range(1, 101)}
    chance = random.Random(20130101)
    answered = 0

    async def requests(first: int):
        for offset in range(first, len(expected) + 1):
            yield pb.WriteStreamRequest(batch=batch(offset, records((offset - 1) * ROWS, ROWS)))

    async def killer(seconds: float) -> None:
        await asyncio.sleep(seconds)
        os.kill(process.running.pid, signal.SIGKILL)

    async def stream() -> None:
        nonlocal answered
        async with open_channel(process.address, timeout_s=20) as channel:
            async for answer in IngestionServiceStub(channel).WriteStream(requests(answered + 1)):
                result = answer.result
                assert (result.offset, result.accepted, result.duplicates) == (answered + 1, ROWS, 0)
                answered = result.offset

    kills = 0
    while answered < len(expected):
        killing = asyncio.create_task(killer(chance.uniform(0.01, 0.15))) if kills < 8 else None
        try:
            await stream()
        except grpc.aio.AioRpcError as error:
            # grpc.aio's own client says INTERNAL when the connection goes while it sends; no server said so.
            if error.code() is not grpc.StatusCode.UNAVAILABLE and error.details() != "Internal error from Core":
                raise
        if killing is not None:
            await killing
            kills += 1
            await asyncio.to_thread(process.running.wait)
            await asyncio.to_thread(process.start)
    assert kills >= 3
    await check_all(process.folder, expected)
