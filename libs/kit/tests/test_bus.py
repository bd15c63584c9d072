"""The contract of the bus, held by the embedded log and by a real Kafka broker alike."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from millrace_kit.bus import Bus, Message, Outgoing, Subscription, TopicPartition, open_bus
from millrace_kit.errors import FailedPreconditionError, UnavailableError
from millrace_kit.settings import BusSettings
from millrace_kit.telemetry import consumer_span, current_trace_id
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

DEADLINE_S = 60.0
PUBLISHER = Path(__file__).with_name("publisher.py")


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> BusSettings:
    if request.param == "embedded":
        return BusSettings(path=str(tmp_path / "bus.sqlite"))
    address = request.getfixturevalue("kafka_address")
    return BusSettings(kind="kafka", bootstrap_servers=(address,), partitions=3)


@pytest.fixture
async def bus(settings: BusSettings) -> AsyncIterator[Bus]:
    opened = await open_bus(settings)
    yield opened
    await opened.close()


@pytest.fixture
def topic() -> str:
    return f"millrace.test.{uuid4().hex}"


def numbered(topic: str, count: int, keys: int = 4) -> list[Outgoing]:
    return [Outgoing(topic, f"key-{n % keys}", str(n).encode()) for n in range(count)]


async def drain(subscription: Subscription, count: int, deadline_s: float = DEADLINE_S) -> list[Message]:
    found: list[Message] = []
    end = time.monotonic() + deadline_s
    while len(found) < count and time.monotonic() < end:
        found += await subscription.fetch(max_messages=100, timeout_s=0.5)
    return found


def after(messages: Sequence[Message]) -> dict[TopicPartition, int]:
    return {m.place: m.offset + 1 for m in messages}


async def test_order_per_key_and_every_message_once(bus: Bus, topic: str) -> None:
    sent = numbered(topic, 500)
    landed = await bus.publish(sent[:300])
    landed = [*landed, *await bus.publish(sent[300:])]
    subscription = await bus.subscribe([topic], group="g")
    read = await drain(subscription, 500)
    assert sorted(int(m.value) for m in read) == list(range(500))
    for key in range(4):
        values = [int(m.value) for m in read if m.key == f"key-{key}"]
        assert values == sorted(values)
        assert len({m.partition for m in read if m.key == f"key-{key}"}) == 1
    places = {(m.place, m.offset): m.value for m in read}
    assert [places[where] for where in landed] == [m.value for m in sent]
    assert not await subscription.fetch(timeout_s=0.1)
    await subscription.close()


async def test_a_batch_over_several_topics_lands_in_order(bus: Bus, topic: str) -> None:
    other = f"{topic}.other"
    landed = await bus.publish([Outgoing(other if n % 2 else topic, "k", str(n).encode()) for n in range(10)])
    assert [place.topic for place, _offset in landed] == [topic, other] * 5
    subscription = await bus.subscribe([topic, other], group="g", at={})
    read = await drain(subscription, 10)
    assert [int(m.value) for m in read if m.topic == topic] == [0, 2, 4, 6, 8]
    assert [int(m.value) for m in read if m.topic == other] == [1, 3, 5, 7, 9]
    await subscription.close()


async def test_what_was_not_committed_comes_again_after_a_restart(bus: Bus, topic: str) -> None:
    await bus.publish([Outgoing(topic, "k", str(n).encode()) for n in range(10)])
    first = await bus.subscribe([topic], group="g")
    read = await drain(first, 10)
    await first.commit(after(read[:4]))
    await first.close()
    second = await bus.subscribe([topic], group="g")
    assert [int(m.value) for m in await drain(second, 6)] == [4, 5, 6, 7, 8, 9]
    await second.close()


async def test_two_groups_do_not_see_each_other(bus: Bus, topic: str) -> None:
    await bus.publish(numbered(topic, 20))
    for group in ("a", "b"):
        subscription = await bus.subscribe([topic], group=group)
        read = await drain(subscription, 20)
        assert len(read) == 20
        await subscription.commit(after(read))
        await subscription.close()


async def test_at_positions_a_consumer_kept_itself(bus: Bus, topic: str) -> None:
    landed = await bus.publish([Outgoing(topic, "k", str(n).encode()) for n in range(10)])
    place, offset = landed[7]
    subscription = await bus.subscribe([topic], group="g", at={place: offset})
    assert [int(m.value) for m in await drain(subscription, 3)] == [7, 8, 9]
    await subscription.close()
    everything = await bus.subscribe([topic], group="g", at={})
    assert len(await drain(everything, 10)) == 10
    await everything.close()


async def test_a_group_that_keeps_its_positions_itself(bus: Bus, topic: str) -> None:
    await bus.publish(numbered(topic, 40))
    kept: dict[TopicPartition, int] = {}

    def starts(places: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return {place: kept[place] for place in places if place in kept}

    first = await bus.subscribe([topic], group="g", starts=starts)
    before = await drain(first, 40)
    # Half of each partition counts as done; nothing was committed to the bus.
    kept.update({place: end // 2 for place, end in after(before).items()})
    await first.close()
    second = await bus.subscribe([topic], group="g", starts=starts)
    again = await drain(second, sum(after(before).values()) - sum(kept.values()))
    assert {m.place: min(x.offset for x in again if x.place == m.place) for m in again} == kept
    await second.close()


@pytest.mark.kafka
async def test_two_of_a_group_share_the_partitions_and_take_over(kafka_address: str, topic: str) -> None:
    settings = BusSettings(kind="kafka", bootstrap_servers=(kafka_address,), partitions=3)
    bus = await open_bus(settings)
    kept: dict[TopicPartition, int] = {}
    asked: list[list[TopicPartition]] = []

    def starts(places: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        asked.append(list(places))
        return dict(kept)

    group = f"g-{topic}"
    first = await bus.subscribe([topic], group=group, starts=starts)
    await bus.publish(numbered(topic, 60, keys=30))
    kept.update(after(await drain(first, 60)))
    second = await bus.subscribe([topic], group=group, starts=starts)
    read: dict[str, set[TopicPartition]] = {"first": set(), "second": set()}
    async with asyncio.timeout(DEADLINE_S):
        while not (read["first"] and read["second"]):
            await bus.publish(numbered(topic, 30, keys=30))
            for name, subscription in (("first", first), ("second", second)):
                messages = await subscription.fetch(timeout_s=0.2)
                read[name] = {m.place for m in messages} or read[name]
                kept.update(after(messages))
    await first.close()
    await bus.publish(numbered(topic, 60, keys=30))
    taken: dict[TopicPartition, int] = {}
    async with asyncio.timeout(DEADLINE_S):
        ends = await second.end_offsets()
        while any({**kept, **taken}.get(place, 0) < end for place, end in ends.items()):
            taken.update(after(await second.fetch(timeout_s=0.2)))
    assert len(taken) == 3, "the one that is left reads every partition"
    assert any(len(places) == 3 for places in asked)
    await second.close()
    await bus.close()


async def test_end_offsets_tell_when_all_is_read(bus: Bus, topic: str) -> None:
    subscription = await bus.subscribe([topic], group="g", at={})
    assert set((await subscription.end_offsets()).values()) == {0}
    await bus.publish(numbered(topic, 50))
    ends = await subscription.end_offsets()
    assert sum(ends.values()) == 50
    read = await drain(subscription, 50)
    assert {**dict.fromkeys(ends, 0), **after(read)} == dict(ends)
    await subscription.close()


async def test_a_subscriber_waits_for_what_comes_later(bus: Bus, topic: str) -> None:
    subscription = await bus.subscribe([topic], group="g")
    waiting = asyncio.create_task(drain(subscription, 1))
    await bus.publish([Outgoing(topic, "k", b"later")])
    assert [m.value for m in await waiting] == [b"later"]
    await subscription.close()


async def test_headers_cross_and_the_trace_goes_on(bus: Bus, topic: str) -> None:
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("producer") as span:
        await bus.publish(
            [Outgoing(topic, "k", b"v", {"extra": b"\x00\xff"}), Outgoing(topic, "k", b"w", {"event-id": b"mine"})]
        )
    subscription = await bus.subscribe([topic], group="g", at={})
    first, second = await drain(subscription, 2)
    assert first.headers["content-type"] == b"application/x-protobuf"
    assert first.headers["extra"] == b"\x00\xff"
    assert len(first.headers["event-id"]) == 36
    assert second.headers["event-id"] == b"mine"
    assert abs(first.timestamp_ms - time.time() * 1000) < 60_000
    with consumer_span("consume", first.headers):
        assert current_trace_id() == trace.format_trace_id(span.get_span_context().trace_id)
    await subscription.close()


async def test_large_messages(bus: Bus, topic: str) -> None:
    large = [bytes([n]) * (5 << 20) for n in range(3)]
    await bus.publish([Outgoing(topic, "k", value) for value in large])
    subscription = await bus.subscribe([topic], group="g", at={})
    assert [m.value for m in await drain(subscription, 3)] == large
    await subscription.close()


async def test_fetch_holds_its_limit(bus: Bus, topic: str) -> None:
    await bus.publish(numbered(topic, 30))
    subscription = await bus.subscribe([topic], group="g", at={})
    sizes = []
    while sum(sizes) < 30:
        sizes.append(len(await subscription.fetch(max_messages=7, timeout_s=5)))
    assert max(sizes) <= 7
    await subscription.close()


async def test_an_empty_key_and_an_empty_batch(bus: Bus, topic: str) -> None:
    assert list(await bus.publish([])) == []
    await bus.publish([Outgoing(topic, "", b"")])
    subscription = await bus.subscribe([topic], group="g", at={})
    (message,) = await drain(subscription, 1)
    assert (message.key, message.value) == ("", b"")
    await subscription.close()


async def test_publishers_in_two_processes_at_once(settings: BusSettings, bus: Bus, topic: str) -> None:
    count = 40
    processes = [publisher(settings, topic, name, count) for name in ("a", "b")]
    for process in processes:
        assert await asyncio.to_thread(process.wait, DEADLINE_S) == 0
    subscription = await bus.subscribe([topic], group="g", at={})
    read = await drain(subscription, 2 * count)
    for name in ("a", "b"):
        assert [m.value.decode() for m in read if m.key == name] == [f"{name}:{n}" for n in range(count)]
    await subscription.close()


async def test_kill_of_a_publisher_loses_nothing_acknowledged(settings: BusSettings, bus: Bus, topic: str) -> None:
    process = publisher(settings, topic, "k", 1_000_000)
    assert process.stdout is not None
    for _ in range(20):
        await asyncio.to_thread(process.stdout.readline)
    process.kill()
    acknowledged = 20 + len(process.stdout.read().splitlines())
    process.wait()
    subscription = await bus.subscribe([topic], group="g", at={})
    read = await drain(subscription, sum((await subscription.end_offsets()).values()))
    values = [m.value.decode() for m in read]
    assert values == [f"k:{n}" for n in range(len(values))]
    assert len(values) in {acknowledged, acknowledged + 1}
    # The next publisher carries on where it stopped.
    await bus.publish([Outgoing(topic, "k", b"next")])
    assert [m.value for m in await drain(subscription, 1)] == [b"next"]
    await subscription.close()


def publisher(settings: BusSettings, topic: str, name: str, count: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(PUBLISHER), settings.model_dump_json(), topic, name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


async def seconds_until_unavailable(call: Callable[[], object]) -> float:
    started = time.monotonic()
    with pytest.raises(UnavailableError):
        await call()  # type: ignore[misc]
    return time.monotonic() - started


async def test_an_embedded_log_that_is_held_by_another_is_unavailable_in_time(tmp_path: Path) -> None:
    import sqlite3

    settings = BusSettings(path=str(tmp_path / "bus.sqlite"), request_timeout_s=0.5)
    bus = await open_bus(settings)
    await bus.publish([Outgoing("t", "k", b"0")])
    other = sqlite3.connect(settings.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert await seconds_until_unavailable(lambda: bus.publish([Outgoing("t", "k", b"1")])) < 5
    other.execute("ROLLBACK")
    other.close()
    # The same bus works again, and the refused message is not half there.
    assert [offset for _place, offset in await bus.publish([Outgoing("t", "k", b"2")])] == [1]
    await bus.close()


async def test_a_kafka_that_is_not_there_is_unavailable_in_time(unused_tcp_port: int) -> None:
    settings = BusSettings(kind="kafka", bootstrap_servers=(f"127.0.0.1:{unused_tcp_port}",), request_timeout_s=1)
    assert await seconds_until_unavailable(lambda: open_bus(settings)) < 10


async def test_kafka_needs_brokers() -> None:
    with pytest.raises(FailedPreconditionError):
        await open_bus(BusSettings(kind="kafka"))


@pytest.mark.kafka
@pytest.mark.slow
async def test_kafka_goes_away_and_comes_back(tmp_path: Path, topic: str) -> None:
    from parts.kafka import start_kafka
    from parts.server import free_port

    port = free_port()
    server = await asyncio.to_thread(start_kafka, tmp_path / "kafka", port=port)
    settings = BusSettings(kind="kafka", bootstrap_servers=(server.address,), request_timeout_s=4)
    bus = await open_bus(settings)
    await bus.publish([Outgoing(topic, "k", b"before")])
    subscription = await bus.subscribe([topic], group="g", at={})
    assert [m.value for m in await drain(subscription, 1)] == [b"before"]
    server.kill()
    assert await seconds_until_unavailable(lambda: bus.publish([Outgoing(topic, "k", b"lost?")])) < 15
    assert list(await subscription.fetch(timeout_s=0.2)) == []
    server = await asyncio.to_thread(start_kafka, tmp_path / "kafka", port=port)
    try:
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            try:
                await bus.publish([Outgoing(topic, "k", b"after")])
                break
            except UnavailableError:
                continue
        read: list[bytes] = []
        while b"after" not in read and time.monotonic() < end:
            read += [m.value for m in await subscription.fetch(timeout_s=0.5)]
        assert read[-1] == b"after"
        await subscription.close()
        await bus.close()
    finally:
        server.stop()


@pytest.mark.kafka
async def test_a_message_kafka_would_never_take_is_refused_for_good(kafka_address: str, topic: str) -> None:
    settings = BusSettings(kind="kafka", bootstrap_servers=(kafka_address,))
    bus = await open_bus(settings)
    with pytest.raises(FailedPreconditionError, match="larger"):
        await bus.publish([Outgoing(topic, "k", bytes((64 << 20) + 1))])
    assert len(await bus.publish([Outgoing(topic, "k", b"fine")])) == 1
    await bus.close()
