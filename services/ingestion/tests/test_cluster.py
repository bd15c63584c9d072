"""What a cluster does to the service: a pod comes back without its disk, two run at once, object storage goes away."""

import asyncio
import shutil
from collections import Counter
from pathlib import Path

import grpc
import grpc.aio
import pytest
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from parts import s3

from .harness import PLACES, bus_messages, code_of, lake, landed, records, serving


async def test_a_lost_disk_loses_nothing(place: Path) -> None:
    async with serving(place, index_flush_ids=50) as client:
        await client.register()
        for offset in range(1, 6):
            await client.write(offset, records(offset * 100, 100))
        if PLACES:  # on one machine the database is on the same disk, and kept
            shutil.rmtree(place / "state")
    shutil.rmtree(place / "state" / "event-ids", ignore_errors=True)
    async with serving(place) as client:
        answer = await client.write(6, records(500, 150))
        assert (answer.accepted, answer.duplicates) == (50, 100)
        again = await client.write(3, records(300, 100))
        assert (again.replayed, again.accepted) == (True, 100)
        assert client.lake().num_rows == 550


async def test_two_writers_at_once_are_safe(place: Path) -> None:
    """Each fences the other when it begins, so at any time at most one lands; clients that try again get everything in once."""
    async with serving(place) as first, serving(place) as second:
        await first.register()

        async def write(client, offset: int, table, source: str) -> bool:
            try:
                answer = await client.write(offset, table, source=source)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return False
            return answer.accepted == 10

        async def produce(number: int) -> None:
            async with asyncio.timeout(120):
                for offset in range(1, 9):
                    table = records((number * 100 + offset) * 10, 10)
                    while not await write((first, second)[offset % 2], offset, table, f"s{number}"):
                        pass

        await asyncio.gather(*(produce(number) for number in range(3)))
    counted = Counter(lake(place)["event_id"].to_pylist())
    assert (len(counted), set(counted.values())) == (240, {1})
    published = {(landed(m).source, landed(m).source_offset) for m in await bus_messages(place)}
    assert len(published) == 24


@pytest.mark.s3
async def test_object_storage_goes_away_and_comes_back(tmp_path: Path) -> None:
    server = s3.start_s3(tmp_path / "s3")
    try:
        with s3.in_environment(server.address):
            async with serving(tmp_path, lake_url=f"s3://{s3.BUCKET}/lake") as client:
                await client.register()
                await client.write(1, records(0, 10))
                server.kill()
                assert await code_of(client.write(2, records(10, 10))) is grpc.StatusCode.UNAVAILABLE
                server = s3.start_s3(tmp_path / "s3", port=int(server.address.rpartition(":")[2]))
                async with asyncio.timeout(60):
                    while await code_of(client.write(2, records(10, 10))) is not grpc.StatusCode.OK:
                        pass
                state = await client.stub.GetTable(pb.GetTableRequest(contract="flights"))
                assert state.rows == 20
    finally:
        server.stop()
