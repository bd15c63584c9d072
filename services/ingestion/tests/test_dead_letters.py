"""Dead letters: where their records came from, their topic, choosing, replaying and discarding them."""

import asyncio
import json
from datetime import timedelta
from pathlib import Path

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_ingestion.app import MIGRATIONS
from millrace_ingestion.checks import UNDECODABLE, Failure, Reject
from millrace_ingestion.contract_messages import contract_from
from millrace_ingestion.convert import letter_to
from millrace_ingestion.intake import decode
from millrace_ingestion.letter_store import Choice, LetterStore
from millrace_ingestion.letter_topic import message
from millrace_ingestion.models import Entry, Group, Incoming
from millrace_ingestion.origins import VALUE_CONVERTER, Origin
from millrace_ingestion.retention import LetterRetention
from millrace_ingestion.store import Store
from millrace_kit.bus import Message, dead_letters_topic
from millrace_kit.bus.embedded import EmbeddedBus
from millrace_kit.clock import FakeClock
from millrace_kit.settings import BusSettings
from millrace_kit.sql import migrate, open_engine

from .harness import code_of, contract, lines, row, serving


def test_a_refused_message_is_kept_with_its_bytes_and_its_place(tmp_path: Path) -> None:
    broken = Origin("flights.raw", 3, 17, 5, b"key", b"\xff\x00", (("h", b"\x01"), ("h", None)))
    place = Origin("flights.raw", 3, 18, 6, None, lines(row("a", carrier="?")))
    incoming = Incoming(
        "flights", "s", 1,
        json_lines=lines(row("a", carrier="?"), row("b")),
        origins=[place, Origin("flights.raw", 3, 19)],
        undecodable=[Reject(2, Failure(UNDECODABLE, "", "bad magic"), "", broken, VALUE_CONVERTER, "ValueError")],
    )  # fmt: skip
    pending = decode(contract_from(contract(), "contract"), incoming, max_rows=10, max_bytes=1 << 20)
    assert incoming.payload_bytes > len(incoming.json_lines or b"") + len(broken.value or b"")
    engine = open_engine(f"sqlite:///{tmp_path}/state.sqlite")
    migrate(engine, MIGRATIONS)
    store = Store(engine, FakeClock())
    store.record(Group("g", "flights", 1, 0, [Entry("s", 1, 1, 0, 2, pending.checked.rejects)]), 1)
    first, second = LetterStore(engine).letters(Choice("flights"), after=0, limit=10)
    assert (first.reason, first.origin, first.stage) == ("PATTERN_MISMATCH", place, "TASK_PUT")
    assert (second.reason, second.stage, second.exception) == (UNDECODABLE, VALUE_CONVERTER, "ValueError")
    shown = letter_to(second).origin
    assert (shown.topic, shown.partition, shown.offset, shown.value) == ("flights.raw", 3, 17, b"\xff\x00")
    assert [(h.name, h.HasField("value")) for h in shown.headers] == [("h", True), ("h", False)]
    sent = message(second)
    assert (sent.topic, sent.key, sent.value) == ("millrace.dead-letters.flights", "key", b"\xff\x00")
    assert {name: sent.headers[f"__connect.errors.{name}"] for name in ("topic", "partition", "offset", "stage")} == {
        "topic": b"flights.raw", "partition": b"3", "offset": b"17", "stage": b"VALUE_CONVERTER"
    }  # fmt: skip
    assert sent.headers["__connect.errors.exception.class.name"] == b"ValueError"
    assert sent.headers["__connect.errors.exception.message"] == b"bad magic"
    assert sent.headers["h"] == b"\x01"
    # Bytes that are no record cannot be replayed as one.
    assert [
        letter.id for letter in LetterStore(engine).letters(Choice("flights"), after=0, limit=10, only_open=True)
    ] == [first.id]
    engine.dispose()


async def test_dead_letters_are_published_once_the_group_is_complete(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await client.register()
        await client.write(1, lines(row("a", carrier="?"), row("b"), "{"))
        found = await published(tmp_path, 2)
        assert [(m.key, m.value) for m in found] == [("s", lines(row("a", carrier="?"))), ("s", b"{")]
        headers = found[0].headers
        assert headers["__connect.errors.exception.message"] == b"carrier: does not match [A-Z0-9]{2}"
        assert (headers["__connect.errors.topic"], headers["__connect.errors.offset"]) == (b"s", b"1")
        assert (headers["millrace.reason"], headers["event-id"]) == (b"PATTERN_MISMATCH", b"flights/dead-letter/1")
    async with serving(tmp_path) as client:
        await client.write(2, lines(row("c", carrier="?")))
        assert [m.headers["event-id"] for m in await published(tmp_path, 3)] == [
            f"flights/dead-letter/{i}".encode() for i in (1, 2, 3)
        ]


async def published(folder: Path, count: int) -> list[Message]:
    bus = await EmbeddedBus.open(BusSettings(path=str(folder / "bus.sqlite")))
    subscription = await bus.subscribe([dead_letters_topic("flights")], group="test", at={})
    found: list[Message] = []
    async with asyncio.timeout(20):
        while len(found) < count:
            found.extend(await subscription.fetch(timeout_s=0.2))
    await subscription.close()
    await bus.close()
    return found


def at(seconds: int) -> Timestamp:
    return Timestamp(seconds=int(FakeClock().now().timestamp()) + seconds)


async def test_dead_letters_are_chosen_tried_replayed_and_discarded(tmp_path: Path) -> None:
    clock = FakeClock()
    async with serving(tmp_path, clock=clock) as client:
        await client.register()
        await client.write(1, lines(*(row(f"a{i}", seats=-i) for i in range(4)), row("p", carrier="?")))
        clock.advance(100)
        await client.write(1, lines(row("b", delay=-101)), source="other")

        async def ids(**choice) -> list[str]:
            request = pb.ListDeadLettersRequest(contract="flights", **choice)
            return [
                json.loads(x.record_json)["event_id"] for x in (await client.stub.ListDeadLetters(request)).dead_letters
            ]

        assert await ids(column="seats") == ["a0", "a1", "a2", "a3"]
        assert await ids(source="other") == ["b"]
        assert await ids(until=at(50), reason="PATTERN_MISMATCH") == ["p"]
        assert await ids(since=at(100)) == ["b"]
        await client.register(contract(seats={"min": -2}))

        async def replay(**choice) -> tuple[int, int]:
            request = pb.ReplayDeadLettersRequest(contract="flights", **choice)
            answer = await client.stub.ReplayDeadLetters(request)
            return answer.replayed, answer.still_rejected

        assert await replay(dry_run=True) == (3, 3)
        assert await replay(dry_run=True, limit=2, column="seats") == (2, 0)
        assert client.lake().num_rows == 0
        assert await replay(limit=2, column="seats") == (2, 0)
        assert await replay(since=at(100)) == (0, 1)
        assert sorted(client.lake()["event_id"].to_pylist()) == ["a0", "a1"]

        async def discard(**choice) -> int:
            request = pb.DiscardDeadLettersRequest(contract="flights", **choice)
            return (await client.stub.DiscardDeadLetters(request)).discarded

        assert await discard(column="seats", limit=3) == 3
        assert await ids() == ["a3", "p", "b"]
        assert await discard(source="nobody") == 0
        assert await discard() == 3
        assert await client.counts() == {}


async def test_discarded_letters_make_room(tmp_path: Path) -> None:
    async with serving(tmp_path, max_dead_letters=1) as client:
        await client.register()
        await client.write(1, lines(row("a", carrier="?")))
        assert await code_of(client.write(2, lines(row("b", carrier="?")))) is grpc.StatusCode.RESOURCE_EXHAUSTED
        await client.stub.DiscardDeadLetters(pb.DiscardDeadLettersRequest(contract="flights"))
        assert (await client.write(2, lines(row("b", carrier="?")))).rejected == 1


async def test_retention_by_age_and_by_number(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/state.sqlite")
    migrate(engine, MIGRATIONS)
    clock, letters, gone = FakeClock(), LetterStore(engine), []
    store = Store(engine, clock)
    for number in range(5):
        reject = Reject(0, Failure("WRONG_TYPE", "x", ""), "{}")
        store.record(Group(f"g{number}", "flights", 1, 0, [Entry("s", number + 1, 0, 0, 1, [reject])]), 1)
        clock.advance(60)

    def retention(max_age: timedelta | None, keep: int | None, *, published: bool) -> LetterRetention:
        return LetterRetention(
            letters, clock, max_age=max_age, keep=keep, published=published, removed=gone.append, every_s=1
        )

    assert await retention(timedelta(seconds=250), None, published=True).trim() == 0
    assert await retention(timedelta(seconds=250), None, published=False).trim() == 1
    letters.mark_published([2, 3], 1)
    assert await retention(None, 3, published=True).trim() == 1
    assert await retention(None, 1, published=True).trim() == 1
    assert await retention(None, None, published=False).trim() == 0
    assert [letter.id for letter in letters.letters(Choice("flights"), after=0, limit=9)] == [4, 5]
    assert gone == [1, 1, 1]
    engine.dispose()
