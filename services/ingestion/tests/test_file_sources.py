"""Files that are pulled: each once, at its times, and what cannot be read named."""

import gzip
from datetime import UTC, datetime, timedelta

import grpc.aio
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_api.ingestion.v1 import sources_pb2
from millrace_api.ingestion.v1.sources_pb2_grpc import SourceServiceStub
from millrace_ingestion.sources.schedule import next_look
from millrace_ingestion.sources.specs import FileSpec
from millrace_kit.client import open_channel
from millrace_kit.content import open_files

from .harness import lines, records, row, serving
from .topics import register, status, until

FAST = {"source_poll_s": 0.1, "source_retry_max_s": 0.3, "source_attempts": 2, "source_batch_records": 30}


@pytest.fixture
async def client(tmp_path):
    (tmp_path / "drop").mkdir()
    async with serving(tmp_path, source_locations=(str(tmp_path / "drop"),), **FAST) as connected:
        await connected.register()
        async with open_channel(connected.address, timeout_s=30) as channel:
            connected.sources = SourceServiceStub(channel)
            yield connected


def file_source(folder, glob: str = "*", **changes) -> sources_pb2.Source:
    files = sources_pb2.FileSource(urls=[f"{folder}/drop/{glob}"], **changes)
    return sources_pb2.Source(name="drop", contract="flights", files=files)


def done(found: sources_pb2.SourceStatus) -> bool:
    return found.state == sources_pb2.SOURCE_STATE_DONE


async def test_every_format_lands_once_and_new_files_later(client) -> None:
    drop = client.folder / "drop"
    pq.write_table(records(0, 100), drop / "a.parquet", row_group_size=40)
    pa_csv.write_csv(records(100, 100), drop / "b.csv")
    (drop / "c.jsonl.gz").write_bytes(
        gzip.compress(lines(*(row(f"e{i}") for i in range(200, 300)), "", row("bad", carrier="?")))
    )
    (drop / "readme.txt").write_text("no records")
    await register(client.sources, file_source(client.folder))
    found = await until(client.sources, done, "drop")
    assert (found.accepted, found.duplicates, found.rejected) == (300, 0, 1)
    assert found.last_result == "3 new files, 302 records"
    assert set(client.lake()["event_id"].to_pylist()) == {f"e{i}" for i in range(300)}
    letters = (await client.stub.ListDeadLetters(pb.ListDeadLettersRequest(contract="flights"))).dead_letters
    assert [(letter.origin.topic, letter.origin.offset) for letter in letters] == [(f"file://{drop}/c.jsonl.gz", 102)]
    pq.write_table(records(300, 10), drop / "d.parquet")
    await client.sources.RunSource(sources_pb2.RunSourceRequest(name="drop"))
    found = await until(client.sources, lambda now: done(now) and now.last_result.startswith("1 new"), "drop")
    assert (found.accepted, found.duplicates) == (310, 0)


async def test_cells_that_are_not_of_their_type_are_dead_letters(client) -> None:
    text = "event_id,at,carrier,delay,seats,more\ne1,2013-01-01T00:00:00Z,UA,1.5,7,x\ne2,2013-01-01 00:00:00,UA,,8,x\n"
    text += 'e3,soon,UA,1,2,x\ne4,2013-01-01T00:00:00+01:00,UA,nan,x,x\n"e,\n5",2013-01-01T00:00:00Z,UA,-inf,,x\n'
    (client.folder / "drop" / "a.csv").write_text(text)
    await register(client.sources, file_source(client.folder))
    found = await until(client.sources, done, "drop")
    assert (found.accepted, found.rejected) == (2, 3)
    assert set(client.lake()["event_id"].to_pylist()) == {"e1", "e2"}
    letters = (await client.stub.ListDeadLetters(pb.ListDeadLettersRequest(contract="flights"))).dead_letters
    assert {(letter.column, letter.reason, letter.origin.offset) for letter in letters} == {
        ("at", "WRONG_TYPE", 3), ("seats", "WRONG_TYPE", 4), ("delay", "OUT_OF_RANGE", 5),
    }  # fmt: skip


async def test_unreadable_files_are_named_and_stop_no_other(client) -> None:
    drop = client.folder / "drop"
    (drop / "a.csv").write_text("event_id,at,carrier\ne1,2013-01-01T00:00:00Z,UA\ne2,UA\n")
    (drop / "b.parquet").write_bytes(b"PAR1 no parquet PAR1")
    (drop / "c.jsonl").write_bytes(lines(row("e3")))
    (drop / "d.jsonl.gz").write_bytes(gzip.compress(lines(row("e4")))[:-20])
    await register(client.sources, file_source(client.folder))
    found = await until(client.sources, done, "drop")
    assert found.last_result.startswith("1 new files, 1 records; 3 unreadable: ")
    for name, problem in (
        ("a.csv", "Expected 3 columns, got 2"),
        ("b.parquet", "row group 0"),
        ("d.jsonl.gz", "line 0"),
    ):
        assert name in found.last_result
        assert problem in found.last_result
    # Left alone until they change, or until somebody asks.
    await client.sources.RunSource(sources_pb2.RunSourceRequest(name="drop"))
    await until(client.sources, lambda now: done(now) and now.last_result == "0 new files, 0 records", "drop")
    (drop / "a.csv").write_text("event_id,at,carrier\ne1,2013-01-01T00:00:00Z,UA\ne2,2013-01-01T00:00:00Z,UA\n")
    await client.sources.ResumeSource(sources_pb2.ResumeSourceRequest(name="drop"))
    found = await until(client.sources, lambda now: done(now) and now.last_result.startswith("1 new files, 2"), "drop")
    assert "2 unreadable" in found.last_result


async def test_files_are_pulled_at_an_interval_and_only_from_allowed_places(client) -> None:
    drop = client.folder / "drop"
    pq.write_table(records(0, 10), drop / "a.parquet")
    await register(client.sources, file_source(client.folder, interval_s=1.0))
    await until(client.sources, lambda now: now.accepted == 10, "drop")
    pq.write_table(records(10, 10), drop / "b.parquet")
    found = await until(client.sources, lambda now: now.accepted == 20, "drop")
    assert found.state == sources_pb2.SOURCE_STATE_RUNNING
    assert found.next_run.ToDatetime(UTC) > datetime.now(UTC) - timedelta(seconds=5)
    for url in ("/etc/passwd", f"{client.folder}/dropped/x.csv", "s3://bucket/x.csv", f"{client.folder}/drop*"):
        source = sources_pb2.Source(name="evil", contract="flights", files=sources_pb2.FileSource(urls=[url]))
        with pytest.raises(grpc.aio.AioRpcError, match="source_locations"):
            await register(client.sources, source)
    assert (await status(client.sources, "drop")).accepted == 20


def at(hour: int, minute: int = 0) -> datetime:
    return datetime(2026, 1, 1, hour, minute, tzinfo=UTC)


def test_missed_ticks_are_one_look() -> None:
    hourly = FileSpec(("/x",), cron="0 * * * *")
    assert next_look(hourly, None, at(1, 30)) == at(1, 30)
    assert next_look(hourly, at(1, 30), at(1, 31)) == at(2)
    assert next_look(hourly, at(1, 30), at(9, 20)) == at(9, 20)
    assert next_look(hourly, at(9, 20), at(9, 20)) == at(10)
    every = FileSpec(("/x",), interval_s=600)
    assert next_look(every, at(1), at(1, 1)) == at(1, 10)
    assert next_look(every, at(1), at(9)) == at(9)
    assert next_look(FileSpec(("/x",)), at(1), at(9)) is None


@pytest.mark.s3
async def test_files_of_an_object_store_are_known_by_their_etag(tmp_path, s3_url: str) -> None:
    fs, path = open_files(f"{s3_url}/drop")
    with fs.open(f"{path}/deep/a.parquet", "wb") as file:
        pq.write_table(records(0, 50), file)
    with fs.open(f"{path}/b.csv", "wb") as file:
        pa_csv.write_csv(records(50, 10), file)
    async with serving(tmp_path, source_locations=(s3_url,), **FAST) as connected:
        await connected.register()
        async with open_channel(connected.address, timeout_s=30) as channel:
            sources = SourceServiceStub(channel)
            files = sources_pb2.FileSource(urls=[f"{s3_url}/drop/**/*.parquet", f"{s3_url}/drop/*.csv"], interval_s=1.0)
            await register(sources, sources_pb2.Source(name="drop", contract="flights", files=files))
            await until(sources, lambda now: now.accepted == 60, "drop")
            with fs.open(f"{path}/b.csv", "wb") as file:
                pa_csv.write_csv(records(50, 20), file)
            found = await until(sources, lambda now: now.accepted == 70, "drop")
            assert found.duplicates == 10
