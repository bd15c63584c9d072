"""kill -9 of ingestion, the feature service, Kafka and Redis at random points under load: nothing lost, nothing doubled.

What was acknowledged is the oracle for the lake, for the topic once copies of a message are dropped by their event id, and for the online
values. `make soak` runs twenty points; the test run, with the same code, a few.
"""

import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import deltalake
import kafka
import pyarrow as pa
import pytest
from millrace_api.events.v1.events_pb2 import RecordsLanded
from millrace_kit.bus import records_topic

from tests.chaos.data_plane import (
    CONTRACT,
    USERS,
    WRITERS,
    Client,
    Plane,
    Reader,
    Writer,
    expected,
    oracle,
)
from tests.stack import eventually

POINTS = int(os.environ.get("MILLRACE_KILL_POINTS", "4"))
SEED = int(os.environ.get("MILLRACE_KILL_SEED", "20130501"))
RECOVERY_S = 120.0
# Kills that come before the one before is made good.
HASTY_SHARE = 0.3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.kafka,
    pytest.mark.redis,
    pytest.mark.timeout(600 + 60 * POINTS),
]


@pytest.fixture
def chance() -> random.Random:
    return random.Random(SEED)


@pytest.fixture
def plane(tmp_path: Path, chance: random.Random) -> Iterator[Plane]:
    one = Plane(tmp_path, chance)
    try:
        one.start()
        yield one
    finally:
        one.stop()


def victims(plane: Plane, chance: random.Random) -> list[str]:
    """Every part as often as the points allow, in random order."""
    names = list(plane.victims)
    chosen = names * (POINTS // len(names)) + chance.sample(names, POINTS % len(names))
    chance.shuffle(chosen)
    return chosen


def test_random_kills(plane: Plane, chance: random.Random) -> None:
    Client(plane).set_up()
    writers = [Writer(plane, number, SEED) for number in range(WRITERS)]
    reader = Reader(plane, writers)
    clients: list[Client] = [*writers, reader]
    for client in clients:
        client.start()
    work_goes_on(clients, chance, "before the first kill")
    for point, name in enumerate(victims(plane, chance)):
        noticed = sum(sum(client.errors.values()) for client in clients)
        plane.victims[name].kill()
        eventually(
            f"somebody notices that {name} is gone",
            lambda noticed=noticed: sum(sum(c.errors.values()) for c in clients) > noticed or broken(clients),
        )
        plane.victims[name].start()
        if chance.random() >= HASTY_SHARE or point == POINTS - 1:
            work_goes_on(clients, chance, f"after {name} came back")
    for writer in writers:
        writer.stop.set()
    for writer in writers:
        writer.join(RECOVERY_S)
        assert not writer.is_alive(), "a batch is never answered"
    sent = [event for writer in writers for table in writer.sent for event in table["event_id"].to_pylist()]
    check_lake(plane, sent)
    check_topic(plane, sent)
    check_online(reader, writers)
    reader.stop.set()
    reader.join(RECOVERY_S)
    assert not broken(clients)
    print(f"{POINTS} kills, {len(sent)} events, errors {dict(sum((c.errors for c in clients), Counter()))}")


def broken(clients: Sequence[Client]) -> bool | None:
    """True when a client met what it must not."""
    return any(client.failure is not None for client in clients) or None


def work_goes_on(clients: Sequence[Client], chance: random.Random, when: str) -> None:
    """Every client gets some more answers; how many is random, and with it the next kill's point."""
    goals = [client.done + chance.randint(2, 12) for client in clients]
    eventually(
        f"work goes on {when}",
        lambda: broken(clients) or all(c.done >= goal for c, goal in zip(clients, goals, strict=True)) or None,
        RECOVERY_S,
    )
    for client in clients:
        assert client.failure is None, f"{when}: {client.failure!r}"


def check_lake(plane: Plane, sent: Sequence[str]) -> None:
    landed = Counter(deltalake.DeltaTable(plane.lake).to_pyarrow_table(columns=["event_id"])["event_id"].to_pylist())
    assert [event for event, count in landed.items() if count > 1] == []
    assert set(landed) == set(sent)


def check_topic(plane: Plane, sent: Sequence[str]) -> None:
    """Copies of a message have the same records (a copy after a crash is read from the lake); one of each makes what was sent."""
    topic = records_topic(CONTRACT)
    consumer = kafka.KafkaConsumer(bootstrap_servers=[plane.broker], enable_auto_commit=False)
    places = [kafka.TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
    consumer.assign(places)
    consumer.seek_to_beginning()
    ends = consumer.end_offsets(places)
    seen: dict[bytes, pa.Table] = {}
    while any(consumer.position(place) < ends[place] for place in places):
        for records in consumer.poll(timeout_ms=1000).values():
            for record in records:
                (event_id,) = [value for name, value in record.headers if name == "event-id"]
                fact = RecordsLanded.FromString(record.value)
                assert event_id == f"{CONTRACT}/{fact.source}/{fact.source_offset}".encode()
                with pa.ipc.open_stream(fact.arrow_ipc) as stream:
                    records_of = stream.read_all().sort_by("event_id")
                first = seen.setdefault(event_id, records_of)
                assert first.to_pylist() == records_of.to_pylist(), "a copy differs"
    consumer.close(autocommit=False)
    published: Counter[str] = Counter()
    for table in seen.values():
        published.update(table["event_id"].to_pylist())
    assert [event for event, count in published.items() if count > 1] == []
    assert set(published) == set(sent)


def check_online(reader: Reader, writers: Sequence[Writer]) -> None:
    wanted = expected(oracle(writers))
    assert set(wanted) == set(USERS)
    with contextlib.suppress(AssertionError):  # what differs says more than that it took too long
        eventually("online values", lambda: reader.newest == wanted or broken([reader]), RECOVERY_S)
    assert reader.newest == wanted
