"""The outbox: nothing committed is lost, nothing rolled back is sent, order and event ids are kept."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from millrace_kit.bus import Outgoing
from millrace_kit.bus.embedded import EmbeddedBus
from millrace_kit.errors import UnavailableError
from millrace_kit.outbox import BATCH, Relay, enqueue, outbox_table
from millrace_kit.settings import BusSettings
from millrace_kit.sql import open_engine
from sqlalchemy import Engine, MetaData, func, select

METADATA = MetaData()
OUTBOX = outbox_table(METADATA)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = open_engine(f"sqlite:///{tmp_path / 't.sqlite'}")
    METADATA.create_all(engine)
    return engine


class FlakyBus:
    """Refuses the first `failures` publishes; `lose_answer` publishes but then says it failed."""

    def __init__(self, inner: EmbeddedBus, failures: int, *, lose_answer: bool = False) -> None:
        self.inner, self.failures, self.lose_answer = inner, failures, lose_answer

    async def publish(self, messages: Sequence[Outgoing]):
        if self.failures:
            self.failures -= 1
            if self.lose_answer:
                await self.inner.publish(messages)
            raise UnavailableError("BUS_UNAVAILABLE", "down")
        return await self.inner.publish(messages)

    async def subscribe(self, topics, *, group, at=None):
        return await self.inner.subscribe(topics, group=group, at=at)

    async def close(self) -> None:
        await self.inner.close()


def put(engine: Engine, *values: bytes) -> None:
    with engine.begin() as connection:
        enqueue(connection, OUTBOX, [Outgoing("t", "k", value) for value in values])


def pending(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(select(func.count()).select_from(OUTBOX)).scalar_one())


async def drained(engine: Engine, bus) -> list:
    relay, stop = Relay(engine, OUTBOX, bus), asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    async with asyncio.timeout(20):
        while pending(engine):
            relay.wake()
            await asyncio.sleep(0.01)
    stop.set()
    await task
    subscription = await bus.subscribe(["t"], group="g")
    messages = list(await subscription.fetch(max_messages=5000, timeout_s=5))
    await subscription.close()
    return messages


async def test_publishes_in_order_and_empties(engine: Engine, tmp_path: Path) -> None:
    bus = await EmbeddedBus.open(BusSettings(path=str(tmp_path / "bus.sqlite")))
    count = BATCH * 2 + 3
    put(engine, *[str(i).encode() for i in range(count)])
    assert [m.value for m in await drained(engine, bus)] == [str(i).encode() for i in range(count)]
    await bus.close()


async def test_a_rolled_back_change_sends_nothing(engine: Engine) -> None:
    def change() -> None:
        with engine.begin() as connection:
            enqueue(connection, OUTBOX, [Outgoing("t", "k", b"x")])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert pending(engine) == 0


async def test_a_bus_that_is_down_is_tried_again(engine: Engine, tmp_path: Path) -> None:
    bus = FlakyBus(await EmbeddedBus.open(BusSettings(path=str(tmp_path / "bus.sqlite"))), failures=3)
    put(engine, b"a", b"b")
    assert [m.value for m in await drained(engine, bus)] == [b"a", b"b"]
    await bus.close()


async def test_a_second_copy_has_the_same_event_id(engine: Engine, tmp_path: Path) -> None:
    bus = FlakyBus(await EmbeddedBus.open(BusSettings(path=str(tmp_path / "bus.sqlite"))), failures=1, lose_answer=True)
    put(engine, b"a")
    messages = await drained(engine, bus)
    assert [m.value for m in messages] == [b"a", b"a"]
    assert len({m.headers["event-id"] for m in messages}) == 1
    await bus.close()
