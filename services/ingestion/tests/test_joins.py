"""Joins in a running service: contracts, positions, kills, what they refuse."""

import asyncio
import time
from collections import Counter

import grpc.aio
import pyarrow as pa
import pytest
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_api.ingestion.v1 import sources_pb2
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from millrace_api.ingestion.v1.sources_pb2_grpc import SourceServiceStub
from millrace_ingestion.joins.join_source import STEPS
from millrace_kit.client import open_channel

from .harness import bus_messages, from_ipc, ipc, lake, landed, serving
from .test_kill import Process
from .topics import register, status, until

FAST = {"source_poll_s": 0.1, "source_retry_max_s": 0.3, "join_step_records": 50, "source_batch_records": 40}
MINUTE = 60.0
INNER, LEFT, AS_OF = sources_pb2.JOIN_KIND_INNER, sources_pb2.JOIN_KIND_LEFT, sources_pb2.JOIN_KIND_AS_OF


def contract(name: str, *more: pb.Column) -> pb.DataContract:
    columns = [
        pb.Column(name=f"{name}_id", type=pb.COLUMN_TYPE_STRING),
        pb.Column(name="at", type=pb.COLUMN_TYPE_TIMESTAMP),
        pb.Column(name="user", type=pb.COLUMN_TYPE_STRING),
        *more,
    ]
    return pb.DataContract(
        name=name, columns=columns, event_id_column=f"{name}_id", event_time_column="at", key_columns=["user"]
    )


SHOWN = contract(
    "shown",
    pb.Column(name="place", type=pb.COLUMN_TYPE_INT64, nullable=True),
    pb.Column(name="score", type=pb.COLUMN_TYPE_DOUBLE, nullable=True),
)
CLICKS = contract("clicks", pb.Column(name="price", type=pb.COLUMN_TYPE_DOUBLE, min=0))


def shown(first: int, count: int, users: int = 20) -> pa.Table:
    """One a second, users in turn."""
    return pa.table(
        {
            "shown_id": [f"s{i}" for i in range(first, first + count)],
            "at": pa.array([i * 1_000_000 for i in range(first, first + count)], pa.timestamp("us", "UTC")),
            "user": [f"u{i % users}" for i in range(first, first + count)],
            "place": list(range(first, first + count)),
        }
    )


def clicks(*seconds: int, users: int = 20) -> pa.Table:
    """Each of the user whose turn it was, half a second after."""
    return pa.table(
        {
            "clicks_id": [f"c{i}" for i in seconds],
            "at": pa.array([i * 1_000_000 + 500_000 for i in seconds], pa.timestamp("us", "UTC")),
            "user": [f"u{i % users}" for i in seconds],
            "price": [float(i) for i in seconds],
        }
    )


def join(kind: int = INNER, name: str = "seen", contract: str = "clicked", **changes) -> sources_pb2.Source:
    given = {"left": "shown", "right": "clicks", "keys": [sources_pb2.JoinKey(left="user")], **changes}
    return sources_pb2.Source(name=name, contract=contract, join=sources_pb2.JoinSource(kind=kind, **given))


async def write(stub: IngestionServiceStub, name: str, offset: int, table: pa.Table) -> None:
    batch = pb.RecordBatch(contract=name, source="s", offset=offset, arrow_ipc=ipc(table))
    answer = await stub.Write(pb.WriteRequest(batch=batch))
    assert answer.accepted + answer.duplicates == table.num_rows


@pytest.fixture
async def client(tmp_path):
    async with serving(tmp_path, **FAST) as connected:
        for one in (SHOWN, CLICKS):
            await connected.register(one)
        async with open_channel(connected.address, timeout_s=30) as channel:
            connected.sources = SourceServiceStub(channel)
            yield connected


def caught_up(found: sources_pb2.SourceStatus) -> bool:
    left, right = found.join.left, found.join.right
    return found.lag == 0 and (left.version, right.version) == (left.newest_version, right.newest_version)


async def drained(client, left: int, right: int, name: str = "seen") -> sources_pb2.SourceStatus:
    """Wait until the join has taken in so many versions of its inputs."""
    return await until(
        client.sources,
        lambda now: caught_up(now) and now.join.left.version >= left and now.join.right.version >= right,
        name,
    )


async def versions(client) -> tuple[int, int]:
    found = [await client.stub.GetTable(pb.GetTableRequest(contract=name)) for name in ("shown", "clicks")]
    return found[0].table.version, found[1].table.version


async def test_what_was_there_and_what_comes_is_joined_and_published(client) -> None:
    await write(client.stub, "shown", 1, shown(0, 130))
    await write(client.stub, "clicks", 1, clicks(3, 50, 200))
    await register(client.sources, join(after_s=1.0))
    await drained(client, *await versions(client))
    assert sorted(client.lake("clicked")["join_id"].to_pylist()) == ["2:s3/c3", "3:s50/c50"]
    # A record of either side finds those of the other, and the click that came before its impression.
    await write(client.stub, "clicks", 2, clicks(120, 201))
    await write(client.stub, "shown", 2, shown(190, 30))
    found = await drained(client, *await versions(client))
    rows = {row["join_id"]: row for row in client.lake("clicked").to_pylist()}
    assert sorted(rows) == ["2:s3/c3", "3:s50/c50", "4:s120/c120", "4:s200/c200", "4:s201/c201"]
    assert (found.accepted, found.duplicates, found.join.matched, found.join.unmatched) == (5, 0, 5, 0)
    row = rows["4:s200/c200"]
    assert (row["joined_at"].timestamp(), row["at"].timestamp(), row["clicks_at"].timestamp()) == (200.5, 200, 200.5)
    assert (row["user"], row["place"], row["price"], row["shown_id"], row["clicks_id"]) == (
        "u0", 200, 200.0, "s200", "c200",
    )  # fmt: skip
    published = [landed(message) for message in await client.messages("clicked")]
    ids = [one for value in published for one in from_ipc(value.arrow_ipc)["join_id"].to_pylist()]
    assert sorted(ids) == sorted(rows)
    assert {value.source for value in published} == {"_seen/join"}
    made = await client.stub.GetContract(pb.GetContractRequest(name="clicked"))
    assert (made.contract.event_id_column, made.contract.event_time_column) == ("join_id", "joined_at")
    assert list(made.contract.key_columns) == ["user"]


async def test_a_left_record_without_a_partner_comes_when_its_time_is_over(client) -> None:
    await register(client.sources, join(LEFT, after_s=1.0, lateness_s=10.0))
    await write(client.stub, "shown", 1, shown(0, 100))
    await write(client.stub, "clicks", 1, clicks(2, 50, 60))
    await drained(client, *await versions(client))
    # The slower input is at 60.5: what was shown until 49.5 is over.
    found = await until(client.sources, lambda now: now.join.settled.ToMicroseconds() == 49_500_000, "seen")
    rows = {row["shown_id"]: row for row in client.lake("clicked").to_pylist()}
    assert sorted(rows, key=lambda one: int(one[1:])) == [f"s{i}" for i in [*range(50), 50, 60]]
    assert [rows[f"s{i}"]["matched"] for i in (1, 2, 3, 50)] == [0, 1, 0, 1]
    alone = rows["s1"]
    assert (alone["join_id"], alone["price"], alone["joined_at"].timestamp()) == ("2:s1", None, 2.0)
    await write(client.stub, "clicks", 2, clicks(1, 55))
    found = await drained(client, *await versions(client))
    assert (found.join.late, found.join.matched) == (1, 4)
    await client.sources.PauseSource(sources_pb2.PauseSourceRequest(name="seen"))
    await write(client.stub, "clicks", 3, clicks(99))
    await register(client.sources, join(LEFT, after_s=1.0, lateness_s=0.0))
    await until(client.sources, lambda now: now.join.settled.ToMicroseconds() == 98_000_000, "seen")
    assert client.lake("clicked").num_rows == 100
    assert len(set(client.lake("clicked")["shown_id"].to_pylist())) == 100


async def test_as_of_enriches_each_record_once(client) -> None:
    await write(client.stub, "clicks", 1, clicks(5, 25, 45, users=20))
    await register(client.sources, join(AS_OF, max_age_s=30.0))
    await write(client.stub, "shown", 1, shown(0, 100))
    await drained(client, (await versions(client))[0], 0)
    await until(client.sources, lambda now: now.accepted == 100, "seen")
    rows = {row["join_id"]: row for row in client.lake("clicked").to_pylist()}
    assert {name: rows[name]["price"] for name in ("s5", "s6", "s25", "s45", "s65", "s85")} == {
        "s5": None, "s6": None, "s25": 5.0, "s45": 25.0, "s65": 45.0, "s85": None,
    }  # fmt: skip
    assert all(row["joined_at"] == row["at"] for row in rows.values())
    assert sum(row["matched"] for row in rows.values()) == 3


async def test_what_a_join_needs_stays_and_what_it_does_not_know_is_refused(client) -> None:
    await register(client.sources, join(after_s=1.0))
    without = pb.DataContract()
    without.CopyFrom(SHOWN)
    without.columns.remove(without.columns[3])
    without.compatibility = pb.COMPATIBILITY_NONE
    free = pb.DataContract()
    free.CopyFrom(SHOWN)
    free.compatibility = pb.COMPATIBILITY_NONE
    await client.register(free)
    with pytest.raises(grpc.aio.AioRpcError, match=r"join 'seen' needs contract 'shown'.*'place'"):
        await client.register(without)
    checked = await client.stub.CheckContract(pb.CheckContractRequest(contract=without))
    assert not checked.compatible
    assert "join 'seen'" in checked.problem
    # A column more of an input reaches the rows once their contract has it.
    wider = pb.DataContract()
    wider.CopyFrom(free)
    wider.columns.append(pb.Column(name="page", type=pb.COLUMN_TYPE_STRING, nullable=True))
    await client.register(wider)
    out = (await client.stub.GetContract(pb.GetContractRequest(name="clicked"))).contract
    out.version = 0
    strange = pb.DataContract()
    strange.CopyFrom(out)
    strange.columns.append(pb.Column(name="weather", type=pb.COLUMN_TYPE_STRING, nullable=True))
    with pytest.raises(grpc.aio.AioRpcError, match=r"'weather'.*no column of 'shown' or 'clicks'"):
        await client.register(strange)
    out.columns.append(pb.Column(name="page", type=pb.COLUMN_TYPE_STRING, nullable=True))
    await client.register(out)
    await write(client.stub, "shown", 1, shown(0, 5).append_column("page", pa.array(list("abcde"))))
    await write(client.stub, "clicks", 1, clicks(3))
    await until(client.sources, lambda now: now.accepted == 1, "seen")
    assert client.lake("clicked")["page"].to_pylist() == ["d"]
    await client.sources.RemoveSource(sources_pb2.RemoveSourceRequest(name="seen"))
    without.columns.append(pb.Column(name="page", type=pb.COLUMN_TYPE_STRING, nullable=True))
    await client.register(without)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (join(0), "join.kind"),
        (join(after_s=-1.0), "join.after_s"),
        (join(after_s=float("nan")), "join.after_s"),
        (join(lateness_s=1.0), "lateness_s"),
        (join(AS_OF, after_s=1.0), "after_s"),
        (join(keys=[]), "join.keys"),
        (join(keys=[sources_pb2.JoinKey(left="user")] * 2), "twice"),
        (join(keys=[sources_pb2.JoinKey(left="user", right="price")]), "equal types"),
        (join(keys=[sources_pb2.JoinKey(left="who")]), "'who'"),
        (join(right="shown", keys=[sources_pb2.JoinKey(left="score")]), "is DOUBLE"),
        (join(left="nothing"), "nothing"),
        (join(contract="shown"), "another one"),
        (join(right_prefix="_"), "right_prefix"),
        (join(contract="given"), "'price': must be DOUBLE"),
        (join(LEFT, contract="strict"), "'price': must be nullable"),
    ],
)
async def test_a_wrong_join_is_refused_by_name(client, source: sources_pb2.Source, problem: str) -> None:
    price = pb.Column(name="price", type=pb.COLUMN_TYPE_INT64, nullable=True)
    given = pb.DataContract(name="given", event_id_column="id", event_time_column="at", columns=[
        pb.Column(name="id", type=pb.COLUMN_TYPE_STRING), pb.Column(name="at", type=pb.COLUMN_TYPE_TIMESTAMP), price,
    ])  # fmt: skip
    await client.register(given)
    given.name = "strict"
    given.columns[2].CopyFrom(pb.Column(name="price", type=pb.COLUMN_TYPE_DOUBLE))
    await client.register(given)
    with pytest.raises(grpc.aio.AioRpcError, match=problem):
        await register(client.sources, source)
    assert not (await client.sources.ListSources(sources_pb2.ListSourcesRequest())).sources


async def test_joins_of_joins_are_allowed_but_no_circle_and_no_second_one(client) -> None:
    await register(client.sources, join(after_s=1.0))
    await register(client.sources, join(name="again", contract="twice", left="clicked", after_s=MINUTE))
    with pytest.raises(grpc.aio.AioRpcError, match="'seen' makes the records"):
        await register(client.sources, join(name="other", after_s=1.0))
    with pytest.raises(grpc.aio.AioRpcError, match=r"began as INNER.*into 'clicked'"):
        await register(client.sources, join(contract="elsewhere", after_s=1.0))
    await register(client.sources, join(name="third", contract="thrice", left="twice", after_s=1.0))
    await client.sources.RemoveSource(sources_pb2.RemoveSourceRequest(name="seen"))
    with pytest.raises(grpc.aio.AioRpcError, match="made of itself"):
        await register(client.sources, join(name="circle", left="thrice", after_s=1.0))
    await until(client.sources, caught_up, "again")
    with pytest.raises(grpc.aio.AioRpcError, match="began as"):
        await register(client.sources, join(name="again", contract="twice", left="clicked", after_s=2.0))
    await register(client.sources, join(after_s=1.0))
    await write(client.stub, "shown", 1, shown(0, 5))
    await write(client.stub, "clicks", 1, clicks(3))
    await until(client.sources, lambda now: now.accepted == 1, "third")
    (row,) = client.lake("thrice").to_pylist()
    assert row["twice_join_id"] == "7:2:s3/c3/c3"
    assert row["clicked_joined_at"] == row["twice_joined_at"] == row["joined_at"]


async def test_a_given_contract_chooses_the_columns_and_its_checks_hold(client) -> None:
    given = pb.DataContract(
        name="clicked",
        columns=[
            pb.Column(name="pair", type=pb.COLUMN_TYPE_STRING),
            pb.Column(name="when", type=pb.COLUMN_TYPE_TIMESTAMP),
            pb.Column(name="user", type=pb.COLUMN_TYPE_STRING),
            pb.Column(name="price", type=pb.COLUMN_TYPE_DOUBLE, max=10),
        ],
        event_id_column="pair",
        event_time_column="when",
        key_columns=["user"],
    )
    await client.register(given)
    await register(client.sources, join(after_s=1.0))
    await write(client.stub, "shown", 1, shown(0, 30))
    await write(client.stub, "clicks", 1, clicks(3, 20))
    found = await until(client.sources, lambda now: now.accepted + now.rejected == 2, "seen")
    assert (found.accepted, found.rejected) == (1, 1)
    (row,) = client.lake("clicked").to_pylist()
    assert (row["pair"], row["user"], row["price"]) == ("2:s3/c3", "u3", 3.0)
    assert await client.counts("clicked") == {"OUT_OF_RANGE": 1}


async def test_freshness_is_about_a_poll_and_a_commit(client) -> None:
    await register(client.sources, join(after_s=1.0))
    await write(client.stub, "shown", 1, shown(0, 200))
    await drained(client, *await versions(client))
    waits: list[float] = []
    for index in range(20):
        began = time.monotonic()
        await write(client.stub, "clicks", index + 1, clicks(index * 10))
        await until(client.sources, lambda now, index=index: now.accepted == index + 1, "seen")
        waits.append(time.monotonic() - began)
    assert sorted(waits)[10] < 1.0, waits


@pytest.fixture
def process(tmp_path):
    one = Process(tmp_path)
    one.changes = FAST
    yield one
    one.kill()


async def write_through(process: Process, name: str, offset: int, table: pa.Table, steps: list[str]) -> None:
    """What a producer does; a dead server is started again, to crash at the next of `steps`."""
    while True:
        if not process.alive():
            await asyncio.to_thread(process.start, steps.pop(0) if steps else "", 2)
        try:
            async with open_channel(process.address, timeout_s=20) as channel:
                await write(IngestionServiceStub(channel), name, offset, table)
                return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LEFT, AS_OF])
async def test_kill_9_at_every_step_loses_and_doubles_nothing(process: Process, kind: int) -> None:
    steps = [*STEPS, "committed", ""]
    process.start()
    bounds = {} if kind == AS_OF else {"after_s": 1.0}
    async with open_channel(process.address, timeout_s=20) as channel:
        stub = IngestionServiceStub(channel)
        for one in (SHOWN, CLICKS):
            await stub.RegisterContract(pb.RegisterContractRequest(contract=one))
        await register(SourceServiceStub(channel), join(kind, **bounds))
    process.kill()
    rounds = 0
    while steps or rounds < 3:
        offset = rounds + 1
        seconds = range(rounds * 90, (rounds + 1) * 90)
        await write_through(process, "clicks", offset, clicks(*[i for i in seconds if i % 3 == 0]), steps)
        await write_through(process, "shown", offset, shown(seconds.start, len(seconds)), steps)
        rounds += 1
        await _joined_or_dead(process, kind)
    if not process.alive():
        await asyncio.to_thread(process.start)
    end = rounds * 90
    await write_through(process, "clicks", rounds + 1, clicks(end + 100_002), [])
    await write_through(process, "shown", rounds + 1, shown(end + 100_000, 1), [])
    last_pairs = {i for i in range(end) if i % 3 == 0}
    await _joined_or_dead(process, kind)
    assert process.alive()
    rows = lake(process.folder, "clicked").to_pylist()
    assert not [one for one, count in Counter(row["join_id"] for row in rows).items() if count > 1]
    by_left = Counter(row["shown_id"] for row in rows)
    assert set(by_left.values()) == {1}
    matched = {int(row["shown_id"][1:]) for row in rows if row.get("clicks_id")}
    everyone = {int(one[1:]) for one in by_left}
    if kind == LEFT:
        assert everyone == set(range(end))
        assert matched == last_pairs
    else:
        assert everyone == {*range(end), end + 100_000}
    published = [
        one for message in await bus_messages(process.folder, "clicked")
        for one in from_ipc(landed(message).arrow_ipc)["join_id"].to_pylist()
    ]  # fmt: skip
    assert set(published) == {row["join_id"] for row in rows}


async def _joined_or_dead(process: Process, kind: int) -> None:
    """Wait until everything that was written is joined, or the process has killed itself."""
    deadline = time.monotonic() + 120
    while process.alive():
        assert time.monotonic() < deadline
        try:
            async with open_channel(process.address, timeout_s=5) as channel:
                stub, sources = IngestionServiceStub(channel), SourceServiceStub(channel)
                newest = [
                    (await stub.GetTable(pb.GetTableRequest(contract=name))).table.version
                    for name in ("shown", "clicks")
                ]
                found = await status(sources, "seen")
        except grpc.aio.AioRpcError:
            continue
        at = found.join
        right = kind == AS_OF or at.right.version >= newest[1]
        if at.left.version >= newest[0] > 0 and right and found.lag == 0:
            return
        await asyncio.sleep(0.02)
