"""Writes through a real server: what is answered, what is in the lake, what is on the bus."""

import asyncio

import grpc
import grpc.aio
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_kit.errors import MillraceError

from .harness import Client, batch, contract, from_ipc, landed, lines, records, row, serving


async def test_arrow_records_land_and_are_published(client: Client) -> None:
    answer = await client.write(1, records(0, 100))
    assert (answer.accepted, answer.duplicates, answer.rejected, answer.replayed) == (100, 0, 0, False)
    table = client.lake()
    assert table.select(records(0, 1).column_names).equals(records(0, 100))
    assert set(table["_source"].to_pylist()) == {"s"}
    assert set(table["_offset"].to_pylist()) == {1}
    (message,) = await client.messages()
    value = landed(message)
    assert from_ipc(value.arrow_ipc).equals(records(0, 100))
    assert (value.source, value.source_offset, value.rows, value.contract_version) == ("s", 1, 100, 1)
    assert value.table_version == answer.table_version
    assert message.headers["event-id"] == b"flights/s/1"


async def test_the_table_is_there_before_the_first_record(client: Client) -> None:
    state = await client.stub.GetTable(pb.GetTableRequest(contract="flights"))
    assert state.rows == 0
    await client.write(1, records(0, 3))
    later = await client.stub.GetTable(pb.GetTableRequest(contract="flights"))
    assert (later.rows, later.table.table) == (3, "flights")
    assert later.table.version > state.table.version


async def test_json_records_land(client: Client) -> None:
    answer = await client.write(
        1, lines(row("a"), row("b", delay=None, at="2013-01-01T01:00:00+01:00"), row("c", at=5))
    )
    assert answer.accepted == 3
    table = client.lake()
    assert table["event_id"].to_pylist() == ["a", "b", "c"]
    assert table["delay"].to_pylist() == [1.5, None, 1.5]
    assert table["at"].cast(pa.int64()).to_pylist() == [1_356_998_400_000_000, 1_356_998_400_000_000, 5]


async def test_a_malformed_line_is_one_dead_letter(client: Client) -> None:
    answer = await client.write(1, lines(row("a"), '{"event_id": "b", ', row("c")))
    assert (answer.accepted, answer.rejected) == (2, 1)
    letters = (await client.stub.ListDeadLetters(pb.ListDeadLettersRequest(contract="flights"))).dead_letters
    assert [(x.reason, x.record_json, x.source, x.offset) for x in letters] == [
        ("MALFORMED_JSON", '{"event_id": "b",', "s", 1)
    ]


async def test_the_same_batch_again_is_answered_not_written(client: Client) -> None:
    first = await client.write(1, lines(row("a"), row("a"), row("b", carrier="?")))
    again = await client.write(1, lines(row("a"), row("a"), row("b", carrier="?")))
    assert (first.accepted, first.duplicates, first.rejected) == (1, 1, 1)
    assert not first.replayed
    first.replayed = True
    assert again == first
    assert client.lake().num_rows == 1
    assert await client.counts() == {"PATTERN_MISMATCH": 1}
    assert len(await client.messages()) == 1


async def test_the_same_batch_twice_at_once_lands_once(client: Client) -> None:
    answers = await asyncio.gather(*(client.write(1, records(0, 10)) for _ in range(5)))
    assert [a.accepted for a in answers] == [10] * 5
    assert sorted(a.replayed for a in answers) == [False, True, True, True, True]
    assert client.lake().num_rows == 10


async def test_duplicates_by_event_id(client: Client) -> None:
    assert (await client.write(1, records(0, 10))).accepted == 10
    other = await client.write(1, records(5, 10), source="other")
    assert (other.accepted, other.duplicates) == (5, 5)
    inside = await client.write(2, pa.concat_tables([records(20, 5), records(22, 5)]))
    assert (inside.accepted, inside.duplicates) == (7, 3)
    all_known = await client.write(3, records(0, 10))
    assert (all_known.accepted, all_known.duplicates) == (0, 10)
    assert sorted(client.lake()["event_id"].to_pylist()) == sorted([f"e{i}" for i in (*range(15), *range(20, 27))])
    assert [landed(m).rows for m in await client.messages()] == [10, 5, 7]


async def test_an_offset_that_was_skipped_is_refused_not_lost(client: Client) -> None:
    await client.write(5, records(0, 1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.write(3, records(1, 1))
    error = MillraceError.from_rpc(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OFFSET_OUT_OF_ORDER")
    assert error.metadata["last_offset"] == "5"


async def test_a_stream_is_answered_in_order_and_merged(client: Client) -> None:
    async def requests():
        for i in range(50):
            yield pb.WriteStreamRequest(batch=batch(i + 1, records(i * 10, 10)))

    before = (await client.stub.GetTable(pb.GetTableRequest(contract="flights"))).table.version
    answers = [answer.result async for answer in client.stub.WriteStream(requests())]
    assert [a.offset for a in answers] == list(range(1, 51))
    assert {a.accepted for a in answers} == {10}
    assert client.lake().num_rows == 500
    assert answers[-1].table_version - before < 50
    values = [landed(m) for m in await client.messages()]
    assert [v.source_offset for v in values] == list(range(1, 51))


async def test_a_bad_batch_ends_the_stream_and_nothing_after_it_lands(client: Client) -> None:
    bad = pb.RecordBatch(contract="flights", source="s", offset=2, arrow_ipc=b"no arrow")

    async def requests():
        for one in (batch(1, records(0, 10)), bad, batch(3, records(20, 10))):
            yield pb.WriteStreamRequest(batch=one)

    answers: list[int] = []

    async def read() -> None:
        async for answer in client.stub.WriteStream(requests()):
            answers.append(answer.result.offset)  # noqa: PERF401 - those before the error count

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    assert answers == [1]
    assert MillraceError.from_rpc(caught.value).metadata == {"field": "batch.arrow_ipc"}
    assert (await client.write(2, records(10, 10))).accepted == 10
    assert (await client.write(3, records(20, 10))).accepted == 10


async def test_a_restart_knows_what_landed(tmp_path) -> None:
    async with serving(tmp_path) as client:
        await client.register()
        first = await client.write(1, records(0, 100))
    async with serving(tmp_path) as client:
        again = await client.write(1, records(0, 100))
        assert (again.accepted, again.replayed, again.table_version) == (100, True, first.table_version)
        other = await client.write(2, records(50, 100))
        assert (other.accepted, other.duplicates) == (50, 50)
        assert client.lake().num_rows == 150


async def test_a_lost_database_does_not_double_the_lake(tmp_path) -> None:
    async with serving(tmp_path) as client:
        await client.register()
        await client.write(1, records(0, 10))
    for file in (tmp_path / "state").glob("ingestion.sqlite*"):
        file.unlink()
    async with serving(tmp_path) as client:
        await client.register()
        again = await client.write(1, records(0, 10))
        assert (again.accepted, again.replayed) == (10, True)
        assert client.lake().num_rows == 10
        assert [m.headers["event-id"] for m in await client.messages()] == [b"flights/s/1"] * 2


async def test_a_new_version_adds_a_column_to_the_lake(client: Client) -> None:
    await client.write(1, records(0, 2))
    made = await client.register(contract(gate={"type": pb.COLUMN_TYPE_STRING, "nullable": True}))
    assert made.version == 2
    assert (await client.write(2, lines(row("x", gate="B7")))).accepted == 1
    assert client.lake().sort_by("event_id")["gate"].to_pylist() == [None, None, "B7"]
    messages = [landed(m) for m in await client.messages()]
    assert [m.contract_version for m in messages] == [1, 2]
    assert "gate" in from_ipc(messages[1].arrow_ipc).column_names


async def test_an_unknown_contract(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.write(1, records(0, 1), name="nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_compaction_and_checkpoints_keep_everything(tmp_path) -> None:
    async with serving(tmp_path, maintain_every_commits=5, index_flush_ids=20) as client:
        await client.register()
        for i in range(23):
            await client.write(i + 1, records(i * 3, 3))
        assert (await client.write(24, records(0, 69))).duplicates == 69
    assert sorted(client.lake()["event_id"].to_pylist()) == sorted(f"e{i}" for i in range(69))
    async with serving(tmp_path) as client:
        assert (await client.write(25, records(0, 69))).duplicates == 69


async def test_rows_keep_their_order_in_the_lake(client: Client) -> None:
    async def requests():
        for i in range(20):
            yield pb.WriteStreamRequest(batch=batch(i + 1, records(i * 10, 10)))

    assert len([answer async for answer in client.stub.WriteStream(requests())]) == 20
    for file in DeltaTable(f"{client.settings.lake()}/flights").file_uris():
        offsets = pq.read_table(file)["_offset"].to_pylist()
        assert offsets == sorted(offsets)
