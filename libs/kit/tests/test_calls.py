"""Unary calls over plain HTTP/1.1 between two processes of ours: a real door on a real port, called by real lines."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from millrace_kit.call_door import CallDoor, DoorCall
from millrace_kit.call_lines import CallLines, Peer, to_port
from millrace_kit.errors import InvalidArgumentError, MillraceError, UnavailableError
from millrace_kit.settings import TlsSettings
from millrace_kit.telemetry import is_recorded
from parts.certificates import Authority, write
from parts.server import free_port

SAY = b"/test.Echo/Say"
PEER = Peer("the echo", "the echo", "ECHO_AWAY", "ECHO_LATE", repeats=True)
AT_MOST = 1 << 16


class Echo:
    """Answers with what it was told, the names of whoever told it in front; `hold` waits for `release`."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.held = asyncio.Semaphore(0)

    async def say(self, call: DoorCall) -> bytes:
        if call.message == b"hold":
            self.held.release()
            await self.release.wait()
        if call.message == b"wrong":
            raise InvalidArgumentError("message", "is wrong")
        return b",".join([*(name.encode() for name in call.client_names), call.message])


@contextlib.asynccontextmanager
async def listening(
    echo: Echo, port: int, *, tls: TlsSettings | None = None, age_s: float = 0.0, allowed: tuple[str, ...] = ()
) -> AsyncIterator[CallDoor]:
    door = CallDoor(
        {SAY.decode(): echo.say}, max_message_bytes=AT_MOST, max_concurrent=4, allowed_clients=allowed,
        max_connection_age_s=age_s, quiet=True, default_deadline_s=5.0,
    )  # fmt: skip
    stop = asyncio.Event()
    running = asyncio.create_task(door.run_on_port(f"localhost:{port}", stop, 0.5, tls=tls))
    try:
        yield door
    finally:
        stop.set()
        await running


async def connected(lines: CallLines) -> None:
    """Wait until the door listens."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(UnavailableError):
                await lines.call(SAY, [], b"there?", 5.0)
                return
            await asyncio.sleep(0.01)


async def test_answers_errors_and_deadlines() -> None:
    echo, port = Echo(), free_port()
    lines = CallLines(to_port(f"dns:///localhost:{port}"), PEER, 4, AT_MOST)
    with pytest.raises(UnavailableError, match="the echo does not listen") as away:
        await lines.call(SAY, [], b"x", 5.0)
    assert away.value.reason == "ECHO_AWAY"
    async with listening(echo, port) as door:
        await connected(lines)
        assert (await lines.call(SAY, [], b"hello" * 1000, 5.0))[0] == b"hello" * 1000
        with pytest.raises(MillraceError) as wrong:
            await lines.call(SAY, [], b"wrong", 5.0)
        assert (wrong.value.code, wrong.value.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "message")
        with pytest.raises(MillraceError) as large:
            await lines.call(SAY, [], b"x" * (AT_MOST + 1), 5.0)
        assert large.value.metadata["limit"] == "max_message_mib"
        with pytest.raises(MillraceError) as unknown:
            await lines.call(b"/test.Echo/Shout", [], b"x", 5.0)
        assert unknown.value.code is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(MillraceError) as late:
            await lines.call(SAY, [], b"hold", 0.05)
        await echo.held.acquire()
        assert late.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        # More than there are lines for wait for one, and the door takes no more than it says.
        held = [asyncio.create_task(lines.call(SAY, [], b"hold", 5.0)) for _ in range(6)]
        for _ in range(4):
            await echo.held.acquire()
        assert len(door.connections) == 4
        echo.release.set()
        assert [answer[0] for answer in await asyncio.gather(*held)] == [b"hold"] * 6
    await lines.close()


async def test_a_call_survives_a_connection_that_ended_while_it_was_silent() -> None:
    echo, port = Echo(), free_port()
    lines = CallLines(to_port(f"localhost:{port}"), PEER, 4, AT_MOST)
    careful = CallLines(to_port(f"localhost:{port}"), Peer("it", "it", "AWAY", "LATE"), 4, AT_MOST)
    async with listening(echo, port) as door:
        await connected(lines)
        await connected(careful)
        for connection in list(door.connections):
            connection.end()
        # In the same turn of the loop: neither of them knows yet that its connection has ended.
        answers = await asyncio.gather(
            lines.call(SAY, [], b"again", 5.0), careful.call(SAY, [], b"once", 5.0), return_exceptions=True
        )
        assert answers[0][0] == b"again"  # type: ignore[index]
        assert isinstance(answers[1], UnavailableError)
        assert (await careful.call(SAY, [], b"next", 5.0))[0] == b"next"
    await lines.close()
    await careful.close()


async def test_a_connection_of_age_is_ended_with_its_answer() -> None:
    echo, port = Echo(), free_port()
    lines = CallLines(to_port(f"localhost:{port}"), PEER, 1, AT_MOST)
    async with listening(echo, port, age_s=0.01) as door:
        await connected(lines)
        (first,) = door.connections
        await asyncio.sleep(0.02)
        for said in (b"one", b"two", b"three"):
            assert (await lines.call(SAY, [], said, 5.0))[0] == said
        assert first not in door.connections
    await lines.close()


async def test_certificates_say_who_calls_and_who_may(tmp_path: Path) -> None:
    authority = Authority.new()
    server = write(tmp_path / "server", authority, "localhost")
    gateway = write(tmp_path / "gateway", authority, "inference-gateway")
    other = write(tmp_path / "other", authority, "somebody")
    stranger = write(tmp_path / "stranger", Authority.new(), "inference-gateway", trusted=authority.pem)
    echo, port = Echo(), free_port()
    async with listening(echo, port, tls=server, allowed=("inference-gateway",)):
        lines = {
            name: CallLines(to_port(f"localhost:{port}", tls), PEER, 1, AT_MOST)
            for name, tls in (("gateway", gateway), ("other", other), ("stranger", stranger))
        }
        await connected(lines["gateway"])
        assert (await lines["gateway"].call(SAY, [], b"hi", 5.0))[0] == b"inference-gateway,hi"
        with pytest.raises(MillraceError) as refused:
            await lines["other"].call(SAY, [], b"hi", 5.0)
        assert (refused.value.reason, refused.value.metadata["client"]) == ("CLIENT_NOT_ALLOWED", "somebody")
        with pytest.raises(UnavailableError):
            await lines["stranger"].call(SAY, [], b"hi", 5.0)
        wrong_name = CallLines(to_port(f"127.0.0.1:{port}", gateway), PEER, 1, AT_MOST)
        with pytest.raises(UnavailableError, match="certificate"):
            await wrong_name.call(SAY, [], b"hi", 5.0)
        for each in lines.values():
            await each.close()


def test_what_says_that_a_trace_is_recorded() -> None:
    parent = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-"
    assert is_recorded({b"traceparent": parent + b"01"})
    assert not is_recorded({b"traceparent": parent + b"00"})
    assert not is_recorded({})
