"""Many reads share one connection to Redis; what fails there ends every waiting read, and the next one begins anew."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import hiredis
import pytest
from millrace_feature.redis_pipeline import PipelinedRedis
from millrace_feature.settings import RedisSettings
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(talk: Talk) -> AsyncIterator[RedisSettings]:
    """A stand-in for Redis that does what a real one cannot be made to do."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await talk(reader, writer)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield RedisSettings(url=f"redis://127.0.0.1:{port}/0", read_timeout_s=0.2, max_waiting_reads=3)
    finally:
        for writer in writers:
            writer.close()
        listening.close()


async def parsed(reader: asyncio.StreamReader, count: int) -> tuple[list[list[bytes]], int]:
    """The next commands, and how many reads of the socket they took."""
    found: list[list[bytes]] = []
    parser, pieces = hiredis.Reader(), 0
    while len(found) < count:
        parser.feed(await reader.read(65536))
        pieces += 1
        while (command := parser.gets()) is not False:
            found.append(command)
    return found, pieces


def hash_of(client: PipelinedRedis, *fields: str) -> Awaitable[list[list[bytes]]]:
    pipe = client.pipeline()
    pipe.hmget("h", fields)
    return pipe.execute()


async def test_requests_of_one_turn_go_together() -> None:
    sizes: list[int] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands, pieces = await parsed(reader, 3)
        sizes.append(pieces)
        for command in commands:
            writer.write(b"*1\r\n" + b"$1\r\n%b\r\n" % command[2])

    async with server(talk) as settings:
        client = PipelinedRedis(settings)
        answers = await asyncio.gather(*(hash_of(client, name) for name in "abc"))
        await client.aclose()
    assert answers == [[[b"a"]], [[b"b"]], [[b"c"]]]
    assert sizes == [1]


async def test_silence_fails_all_and_the_next_read_connects_anew() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        if connections == 1:
            await reader.read(1)
            return
        await parsed(reader, 1)
        writer.write(b"*1\r\n$2\r\nok\r\n")

    async with server(talk) as settings:
        client = PipelinedRedis(settings)
        failed = await asyncio.gather(hash_of(client, "a"), hash_of(client, "b"), return_exceptions=True)
        assert [type(error) for error in failed] == [RedisTimeoutError, RedisTimeoutError]
        assert await hash_of(client, "a") == [[b"ok"]]
        await client.aclose()
    assert connections == 2


async def test_reads_that_wait_are_bounded() -> None:
    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async with server(talk) as settings:
        client = PipelinedRedis(settings)
        found = await asyncio.gather(*(hash_of(client, "a") for _ in range(4)), return_exceptions=True)
        await client.aclose()
    assert "3 reads wait" in str(found[-1])
    assert all(isinstance(error, RedisError) for error in found)


async def test_a_peer_that_hangs_up_or_is_away() -> None:
    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with server(talk) as settings:
        client = PipelinedRedis(settings)
        with pytest.raises(RedisConnectionError):
            await hash_of(client, "a")
    with pytest.raises(ConnectionRefusedError):
        await hash_of(client, "a")
    await client.aclose()


@pytest.mark.redis
async def test_a_real_redis(redis_url: str) -> None:
    client = PipelinedRedis(RedisSettings(url=redis_url))
    pipe = client.pipeline()
    pipe.hmget("nothing", ["a", "b"])
    pipe.zrevrangebyscore("nothing", 5, "-inf", start=0, num=1)
    assert await pipe.execute() == [[None, None], []]
    wrong = client.pipeline()
    wrong.zrevrangebyscore("nothing", "high", "-inf", start=0, num=1)
    with pytest.raises(ResponseError, match="min or max"):
        await wrong.execute()
    assert await hash_of(client, "a") == [[None]]
    await client.aclose()
