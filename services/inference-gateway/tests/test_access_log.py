"""Envoy's access log as files: read once and whole whatever ends, in bounded room, and with what callers write into their headers."""

import asyncio
import json
from pathlib import Path

import models
import pytest
from gateway import MODEL, arm, eventually, gateway, route
from millrace_inference_gateway import access_log_follower, envoy_supervisor
from millrace_inference_gateway.access_log import Line, line_format, read_call, read_line
from millrace_inference_gateway.access_log_follower import AccessLogFollower
from millrace_inference_gateway.envoy_supervisor import AccessLog
from millrace_inference_gateway.journal import LogPosition

START = LogPosition()


def text(**fields: object) -> bytes:
    named = {
        "listener": "v2",
        "start_ns": "1000",
        "took_us": 20,
        "cluster": "arm/m/1.0.0",
        "trailer_status": "0",
    } | fields
    return json.dumps({"v": [named.get(name) for name in Line.__struct_fields__]}).encode() + b"\n"


class Asked:
    """What the supervisor asks of Envoy: to open the file it is to write to now."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.reopen()

    def reopen(self) -> None:
        self._file = (self._folder / "current").open("ab", buffering=0)

    def tell(self, path: str) -> None:
        assert path == "/reopen_logs"
        self.reopen()

    def write(self, content: bytes) -> None:
        self._file.write(content)


class Reading:
    """A follower and what it took."""

    def __init__(self, folder: Path, start: LogPosition = START) -> None:
        self.ids: list[str | None] = []
        self.position = start
        self.missed = 0
        self.follower = AccessLogFollower(
            folder / "access", folder / "taken.json", start, take=self._take, missed=self._missed, interval_s=0.01
        )

    def _take(self, lines: list[Line], position: LogPosition) -> None:
        self.ids += [line.request_id for line in lines]
        self.position = position

    def _missed(self, calls: int) -> None:
        self.missed += calls

    async def all(self) -> "Reading":
        stop = asyncio.Event()
        stop.set()
        await self.follower.run(stop)
        return self


def writing(folder: Path, **limits: int) -> tuple[AccessLog, Asked]:
    log = AccessLog(str(folder / "access"), **({"max_bytes": 500, "max_files": 3} | limits))
    return log, Asked(folder / "access")


async def test_files_are_read_once_in_order_and_removed(tmp_path: Path) -> None:
    log, envoy = writing(tmp_path, max_files=100)
    found: list[str | None] = []
    reading = Reading(tmp_path)
    for n in range(40):
        envoy.write(text(request_id=str(n)))
        log.look(envoy)
        if n % 7 == 0:
            found += (await reading.all()).ids
            # Each is a process of its own; every second one has what the journal knows, the others only what was kept.
            reading = Reading(tmp_path, reading.position if n % 2 else START)
    assert len(log.files()) > 1
    found += (await reading.all()).ids
    assert found == [str(n) for n in range(40)]
    assert len(log.files()) == 1
    assert reading.missed == 0


async def test_half_a_line_waits_and_that_of_a_dead_envoy_is_nobodys(tmp_path: Path) -> None:
    _log, envoy = writing(tmp_path)
    reading, whole = Reading(tmp_path), text(request_id="a")
    envoy.write(whole[:30])
    assert (await reading.all()).ids == []
    envoy.write(whole[30:] + text(request_id="b")[:20])
    assert (await reading.all()).ids == ["a"]
    # The next start of Envoy.
    _log, envoy = writing(tmp_path)
    envoy.write(text(request_id="c") + b"no line\n" + text(request_id="d"))
    assert (await reading.all()).ids == ["a", "c", "d"]
    assert reading.missed == 1


async def test_what_nobody_reads_is_bounded_and_counted(tmp_path: Path) -> None:
    log, envoy = writing(tmp_path)
    for n in range(60):
        envoy.write(text(request_id=str(n)))
        log.look(envoy)
    files = log.files()
    assert len(files) == 3
    assert sum(path.stat().st_size for path in files) < 3 * 1000
    reading = await Reading(tmp_path, LogPosition(5, 5)).all()
    assert reading.ids == [str(n) for n in range(60)][-len(reading.ids) :]
    assert reading.missed + len(reading.ids) == 60
    # Known to the next process too, and counted on.
    assert (await Reading(tmp_path, reading.position).all()).missed == reading.missed


async def test_a_position_of_a_folder_that_is_gone_means_the_beginning(tmp_path: Path) -> None:
    _log, envoy = writing(tmp_path)
    envoy.write(text(request_id="a"))
    assert (await Reading(tmp_path, LogPosition(2**63, 7)).all()).ids == ["a"]


async def test_a_line_longer_than_a_chunk_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log_follower, "CHUNK_BYTES", 600)
    _log, envoy = writing(tmp_path)
    envoy.write(text(request_id="a") + b"x" * 1500 + b"\n" + text(request_id="b"))
    reading = await Reading(tmp_path).all()
    assert reading.ids == ["a", "b"]
    assert reading.missed >= 1


def test_names_grow_when_the_clock_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = writing(tmp_path)
    before = (tmp_path / "access" / "current").readlink()
    monkeypatch.setattr(envoy_supervisor.time, "time_ns", lambda: 5)
    log.begin()
    assert (tmp_path / "access" / "current").readlink() > before


def test_the_format_and_the_line_agree() -> None:
    fields = line_format("v2")["v"]
    assert fields[0] == "v2"
    assert len(fields) == len(Line.__struct_fields__)
    call = read_call(read_line(text(request_id="r", upstream_us=1500, server="[::1]:8000", cluster="http/m/1.0.0")))
    assert call is not None
    assert (call.model, call.version, call.status, call.latency_ms) == ("m", "1.0.0", 0, 1.5)
    assert call.server == ("arm/m/1.0.0", "::1", 8001)
    assert call.finished_ns == 21_000


async def test_headers_can_neither_break_nor_forge_a_line() -> None:
    subjects = [b'"]}\\u0041\\n{"v":["v2"', b"\xff\xfe\x80", b"\x1f\x7f\x01", "schön".encode(), b"a\tb"]
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        host, _, port = g.public.rpartition(":")
        taken = []
        for subject in subjects:
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nx-millrace-subject: ".encode()
            writer.write(head + subject + b"\r\nconnection: close\r\n\r\n{}")
            status = (await asyncio.wait_for(reader.read(), 10)).split(b"\r\n")[0]
            writer.close()
            # The stand-in speaks no HTTP, so a call that got through fails at the server.
            if b" 400 " not in status:
                taken.append(subject)
        assert b"\xff\xfe\x80" in taken

        async def seen() -> list[Line] | None:
            files = sorted(g.settings.access_log.glob("*.log"))
            lines = [read_line(each) for path in files for each in path.read_bytes().splitlines()]
            return lines if len(lines) >= len(taken) else None

        lines = await eventually(seen, "a line for each call")
        assert len(lines) == len(taken)
        for line, subject in zip(lines, taken, strict=True):
            assert line.listener == "v2"
            assert line.subject
            if subject.isascii():
                assert line.subject == subject.decode()
