"""kill -9 at any time: what was acknowledged is there, what was announced is announced once per event id, in order."""

import asyncio
import random

import grpc
import pytest
from millrace_api.events.v1 import events_pb2
from millrace_kit.bus import MODELS, open_bus
from millrace_kit.client import open_channel
from millrace_kit.errors import MillraceError
from millrace_registry.settings import RegistrySettings

from .harness import Client, Process, R, sha

KILLS = 3
SEED = 3


async def write_until_killed(
    client: Client, acknowledged: list[int], numbers: "asyncio.Queue[int]", answered: asyncio.Semaphore
) -> None:
    """Register one version after the other; keeps the numbers whose answer came."""
    while True:
        number = await numbers.get()
        try:
            await client.register(f"1.0.{number}", content=b"model %d" % number)
        except MillraceError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                raise
            return
        acknowledged.append(number)
        answered.release()


@pytest.mark.slow
async def test_kill_loses_nothing_acknowledged(process: Process, settings: RegistrySettings) -> None:
    choice = random.Random(SEED)
    acknowledged: list[int] = []
    numbers: asyncio.Queue[int] = asyncio.Queue()
    for number in range(100_000):
        numbers.put_nowait(number)
    async with open_channel(process.address) as channel:
        client = Client(channel)
        await client.create_model()
        for _ in range(KILLS):
            answered = asyncio.Semaphore(0)
            writers = [
                asyncio.create_task(write_until_killed(client, acknowledged, numbers, answered)) for _ in range(4)
            ]
            async with asyncio.timeout(60):
                for _ in range(choice.randint(5, 15)):
                    await answered.acquire()
            await asyncio.to_thread(process.kill)
            await asyncio.gather(*writers)
            process.start()
            await process.ready()
        versions = (await client.call("ListVersions", R.ListVersionsRequest(model="m"))).versions
        kept = {int(v.version.removeprefix("1.0.")): v for v in versions}
        assert set(acknowledged) <= set(kept)
        for number, version in kept.items():
            assert version.artifacts[0].sha256 == sha(b"model %d" % number)
            assert await client.get(version.artifacts[0].sha256) == b"model %d" % number
        # A number that was cut off can be given again, with the same content.
        cut_off = set(range(max(kept))) - set(kept)
        for number in cut_off:
            assert (await client.register(f"1.0.{number}", content=b"model %d" % number)).created
        entries = (await client.audit(page_size=1000)).entries
        assert len(entries) == 1 + len(kept) + len(cut_off)
        await all_announced(settings, len(kept) + len(cut_off))


async def all_announced(settings: RegistrySettings, count: int) -> None:
    """Every version on the bus, in order; a repeated message has the same event id and content."""
    bus = await open_bus(settings.bus)
    subscription = await bus.subscribe([MODELS], group="test", at={})
    first: dict[bytes, events_pb2.ModelChanged] = {}
    async with asyncio.timeout(60):
        while len(first) < count:
            for message in await subscription.fetch(timeout_s=0.5):
                event = events_pb2.ModelChanged.FromString(message.value)
                assert first.setdefault(message.headers["event-id"], event) == event
    sequences = [event.sequence for event in first.values()]
    assert sequences == list(range(2, count + 2))
    assert len({event.version.version for event in first.values()}) == count
    await subscription.close()
    await bus.close()
