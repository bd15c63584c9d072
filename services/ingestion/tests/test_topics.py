"""Topics of others on a real broker: every message once in the lake, or once among the dead letters."""

import asyncio
import json
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager

import confluent_kafka as ck
import grpc.aio
import pytest
from confluent_kafka.admin import AdminClient
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_api.ingestion.v1 import sources_pb2
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from millrace_api.ingestion.v1.sources_pb2_grpc import SourceServiceStub
from millrace_kit.client import open_channel

from .harness import contract, lake, row, serving
from .registry_server import schema_registry
from .test_decoding import AVRO, FLIGHT, avro, wired
from .test_kill import Process
from .topics import committed, landed, new_topic, produce, register, status, topic_source, until

pytestmark = pytest.mark.kafka
FAST = {"source_lease_s": 1.5, "source_linger_ms": 50.0, "source_poll_s": 0.2, "source_retry_max_s": 0.5}


@asynccontextmanager
async def connected_service(folder, **changes):
    async with serving(folder, **{**FAST, **changes}) as connected:
        await connected.register()
        async with open_channel(connected.address, timeout_s=30) as channel:
            connected.sources = SourceServiceStub(channel)
            yield connected


@pytest.fixture
async def client(tmp_path):
    async with connected_service(tmp_path) as connected:
        yield connected


def ids(client, name: str = "flights") -> list[str]:
    return sorted(client.lake(name)["event_id"].to_pylist())


async def test_json_messages_land_once_and_poison_is_kept_whole(client, kafka_address: str) -> None:
    topic = new_topic(kafka_address)
    pretty = b'{\n  "event_id": "e2",\n  "at": "2013-01-01T00:00:00Z", "carrier": "UA"\n}'
    values = [
        row("e1"),
        pretty,
        b"\xff\xfe",
        None,
        b'"text"',
        row("e3", carrier="?"),
        row("e1"),
        b"{broken}",
        row("e4"),
    ]
    produce(kafka_address, topic, values, headers=[("trace", b"abc"), ("trace", b"def")], key=b"k")
    await register(client.sources, topic_source(kafka_address, topic))
    found = await until(client.sources, landed(len(values)))
    assert (found.accepted, found.duplicates, found.rejected) == (3, 1, 5)
    assert ids(client) == ["e1", "e2", "e4"]
    assert set(client.lake()["_source"].to_pylist()) == {f"_orders/{topic}-0"}
    assert await client.counts() == {"UNDECODABLE": 3, "PATTERN_MISMATCH": 1, "MALFORMED_JSON": 1}
    answer = await client.stub.ListDeadLetters(pb.ListDeadLettersRequest(contract="flights"))
    by_offset = {letter.origin.offset: letter for letter in answer.dead_letters}
    assert sorted(by_offset) == [2, 3, 4, 5, 7]
    for offset, letter in by_offset.items():
        assert (letter.origin.topic, letter.origin.partition, letter.origin.key) == (topic, 0, b"k")
        assert [(header.name, header.value) for header in letter.origin.headers] == [
            ("trace", b"abc"),
            ("trace", b"def"),
        ]
        assert letter.origin.timestamp_ms > 0
        assert letter.origin.HasField("value") == (offset != 3)
    assert by_offset[2].origin.value == b"\xff\xfe"
    assert (by_offset[2].reason, by_offset[2].stage) == ("UNDECODABLE", "VALUE_CONVERTER")
    group = "millrace-orders"
    await until(client.sources, lambda now: now.lag == 0 and committed(kafka_address, group, topic) == len(values))


async def test_reading_goes_on_from_what_landed_whatever_the_group_says(client, kafka_address: str) -> None:
    topic = new_topic(kafka_address, 2)
    produce(kafka_address, topic, [row(f"a{i}") for i in range(50)], partition=0)
    produce(kafka_address, topic, [row(f"b{i}") for i in range(50)], partition=1)
    first = await register(client.sources, topic_source(kafka_address, topic))
    await until(client.sources, landed(100))
    await client.sources.PauseSource(sources_pb2.PauseSourceRequest(name="orders"))
    produce(kafka_address, topic, [row(f"c{i}") for i in range(10)], partition=1)
    assert (await status(client.sources)).state == sources_pb2.SOURCE_STATE_PAUSED
    # Another group has no committed positions; the second version reads on from the lake all the same.
    second = await register(client.sources, topic_source(kafka_address, topic, group="other"))
    assert (first.version, second.version) == (1, 2)
    found = await until(client.sources, landed(110))
    assert (found.accepted, found.duplicates) == (110, 0)
    assert len(ids(client)) == 110
    again = await client.sources.RegisterSource(
        sources_pb2.RegisterSourceRequest(source=topic_source(kafka_address, topic, group="other"))
    )
    assert (again.created, again.source.version) == (False, 2)
    await client.sources.RemoveSource(sources_pb2.RemoveSourceRequest(name="orders"))
    assert not (await client.sources.ListSources(sources_pb2.ListSourcesRequest())).sources
    produce(kafka_address, topic, [row("d")], partition=0)
    assert (await register(client.sources, topic_source(kafka_address, topic))).version == 3
    await until(client.sources, lambda _now: len(ids(client)) == 111)
    await client.register(contract("other_flights"))
    with pytest.raises(grpc.aio.AioRpcError, match="contract and kind stay"):
        await register(client.sources, topic_source(kafka_address, topic, contract="other_flights"))


async def test_avro_by_a_registry_that_goes_away_and_comes_back(client, kafka_address: str) -> None:
    topic = new_topic(kafka_address)
    with schema_registry() as registry:
        registry.broken = True
        registry.add(1, "AVRO", json.dumps(AVRO))
        values = [wired(1, avro({**FLIGHT, "event_id": f"a{i}"})) for i in range(20)]
        produce(kafka_address, topic, [*values, wired(77, b""), b"plain"])
        await register(client.sources, topic_source(kafka_address, topic, format=2, schema_registry_url=registry.url))
        found = await until(client.sources, lambda now: now.state == sources_pb2.SOURCE_STATE_RETRYING)
        assert "SCHEMA_REGISTRY_UNAVAILABLE" in found.error
        assert found.accepted == found.rejected == 0
        registry.broken = False
        found = await until(client.sources, landed(22))
    assert (found.accepted, found.rejected, found.error) == (20, 2, "")
    assert ids(client) == sorted(f"a{i}" for i in range(20))
    letters = (await client.stub.ListDeadLetters(pb.ListDeadLettersRequest(contract="flights"))).dead_letters
    assert [(one.origin.offset, one.origin.value, one.exception) for one in letters] == [
        (20, wired(77, b""), "SchemaNotFound"),
        (21, b"plain", "UndecodableError"),
    ]


async def test_lost_messages_and_replaced_topics_stop_a_source_by_name(client, kafka_address: str) -> None:
    topic = new_topic(kafka_address)
    produce(kafka_address, topic, [row(f"a{i}") for i in range(10)])
    await register(client.sources, topic_source(kafka_address, topic))
    await until(client.sources, landed(10))
    await client.sources.PauseSource(sources_pb2.PauseSourceRequest(name="orders"))
    produce(kafka_address, topic, [row(f"b{i}") for i in range(10)])
    admin = AdminClient({"bootstrap.servers": kafka_address})
    for done in admin.delete_records([ck.TopicPartition(topic, 0, 15)]).values():
        await asyncio.to_thread(done.result, 30)
    await client.sources.ResumeSource(sources_pb2.ResumeSourceRequest(name="orders"))
    found = await until(client.sources, lambda now: now.state == sources_pb2.SOURCE_STATE_FAILED)
    assert f"MESSAGES_LOST: {topic}-0 lost the messages 10 to 14" in found.error
    await register(client.sources, topic_source(kafka_address, topic, skip_lost=True))
    found = await until(client.sources, landed(15))
    assert (found.state, found.error) == (sources_pb2.SOURCE_STATE_RUNNING, "")
    assert ids(client)[10:] == [f"b{i}" for i in range(5, 10)]


async def test_latest_begins_at_the_registration_and_is_remembered(client, kafka_address: str) -> None:
    topic = new_topic(kafka_address)
    produce(kafka_address, topic, [row("old")])
    await register(client.sources, topic_source(kafka_address, topic, start=2))
    await until(client.sources, lambda now: len(now.partitions) == 1)
    await client.sources.PauseSource(sources_pb2.PauseSourceRequest(name="orders"))
    produce(kafka_address, topic, [row("new")])
    await client.sources.ResumeSource(sources_pb2.ResumeSourceRequest(name="orders"))
    await until(client.sources, landed(1))
    assert ids(client) == ["new"]


async def test_two_services_share_partitions_and_take_over_without_loss_or_copy(tmp_path, kafka_address: str) -> None:
    """A rolling update: the second waits for its turn while the first reads, and reads on when that goes."""
    topic = new_topic(kafka_address, 3)
    written: list[str] = []

    def write(name: str) -> None:
        for partition in range(3):
            found = [f"{name}-{partition}-{i}" for i in range(200)]
            produce(kafka_address, topic, [row(one) for one in found] + [b"poison"], partition=partition)
            written.extend(found)

    def service(name: str):
        database = f"sqlite:///{tmp_path}/shared.sqlite"
        return connected_service(tmp_path, state_dir=str(tmp_path / name), database_url=database)

    first_stack = AsyncExitStack()
    first = await first_stack.enter_async_context(service("a"))
    await register(first.sources, topic_source(kafka_address, topic))
    write("one")
    await until(first.sources, landed(3 * 201))
    async with service("b") as second:
        write("two")
        await until(first.sources, landed(6 * 201))
        assert not (await status(second.sources)).partitions
        write("three")
        await first_stack.aclose()
        found = await until(second.sources, lambda now: now.lag == 0 and len(now.partitions) == 3)
        assert found.duplicates == 0
        assert await second.counts() == {"UNDECODABLE": 9}
    assert Counter(lake(tmp_path)["event_id"].to_pylist()) == Counter(written)


async def test_two_readers_of_one_group_share_partitions_and_land_each_message_once(client, kafka_address: str) -> None:
    """Whatever the lease says: partitions come and go while messages come, and batches under way land first."""
    topic = new_topic(kafka_address, 4)
    await register(client.sources, topic_source(kafka_address, topic))
    await until(client.sources, lambda now: len(now.partitions) == 4)
    written: list[str] = []

    def write(name: str) -> None:
        for partition in range(4):
            found = [f"{name}-{partition}-{i}" for i in range(100)]
            produce(kafka_address, topic, [row(one) for one in found], partition=partition)
            written.extend(found)

    write("one")
    other = ck.Consumer({"bootstrap.servers": kafka_address, "group.id": "millrace-orders", "session.timeout.ms": 6000})
    other.subscribe([topic])
    try:
        write("two")

        async def joined() -> bool:
            await asyncio.to_thread(other.poll, 0.2)
            return len(other.assignment()) == 2

        while not await joined():
            write("more")
        await until(client.sources, lambda now: len(now.partitions) == 2)
    finally:
        await asyncio.to_thread(other.close)
    write("last")
    await until(client.sources, lambda now: len(now.partitions) == 4 and now.lag == 0)
    found = await status(client.sources)
    assert found.rejected == 0
    assert set(ids(client)) == set(written)
    assert len(ids(client)) == len(set(written))


@pytest.fixture
def process(tmp_path):
    one = Process(tmp_path)
    one.changes = {**FAST, "source_batch_records": 100}
    yield one
    one.kill()


@pytest.mark.slow
async def test_kill_9_in_the_middle_of_reading_loses_and_doubles_nothing(process: Process, kafka_address: str) -> None:
    topic = new_topic(kafka_address, 2)
    wanted = [f"k{i}" for i in range(3_000)]
    for partition in range(2):
        values = [row(one) for one in wanted[partition::2]]
        # Some without an id that would betray a copy: only the position keeps a dead letter from being there twice.
        mixed = [value for i, one in enumerate(values) for value in ([one, b"poison"] if i % 50 == 0 else [one])]
        produce(kafka_address, topic, mixed, partition=partition)
    steps = ["intent", "committed", "published", ""]
    process.start(steps.pop(0), times=4)
    async with open_channel(process.address, timeout_s=20) as channel:
        await process_register(channel, kafka_address, topic)
    while steps:
        await asyncio.to_thread(process.running.wait, 60)
        step = steps.pop(0)
        await asyncio.to_thread(process.start, step, 3)
    async with open_channel(process.address, timeout_s=20) as channel:
        sources = SourceServiceStub(channel)
        await until(sources, lambda now: now.lag == 0 and len(now.partitions) == 2)
        answer = await client_counts(channel)
    assert Counter(lake(process.folder)["event_id"].to_pylist()) == Counter(wanted)
    assert answer == {"UNDECODABLE": 60}


async def process_register(channel, address: str, topic: str) -> None:
    await IngestionServiceStub(channel).RegisterContract(pb.RegisterContractRequest(contract=contract()))
    await register(SourceServiceStub(channel), topic_source(address, topic))


async def client_counts(channel) -> dict[str, int]:
    answer = await IngestionServiceStub(channel).CountDeadLetters(pb.CountDeadLettersRequest(contract="flights"))
    return {one.reason: one.count for one in answer.counts}
