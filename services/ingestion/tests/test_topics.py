"""Topics of others on a real broker: every message once in the lake, or once among the dead letters."""

import grpc.aio
import pytest
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_api.ingestion.v1 import sources_pb2
from millrace_api.ingestion.v1.sources_pb2_grpc import SourceServiceStub
from millrace_kit.client import open_channel

from .harness import contract, row, serving
from .topics import committed, landed, new_topic, produce, register, status, topic_source, until

pytestmark = pytest.mark.kafka
FAST = {"source_linger_ms": 50.0, "source_poll_s": 0.2, "source_retry_max_s": 0.5}


@pytest.fixture
async def client(tmp_path):
    async with serving(tmp_path, **FAST) as connected:
        await connected.register()
        async with open_channel(connected.address, timeout_s=30) as channel:
            connected.sources = SourceServiceStub(channel)
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
