"""Processes of one service behind one port: all answer, they end together."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = """
import asyncio
from millrace_kit.entry import run_service
from millrace_kit.server import Service
from millrace_kit.settings import ServiceSettings

async def build(settings):
    with open(settings.state_dir.replace("/", "_"), "w") as out:
        out.write(str(__import__("os").getpid()))
    return Service("small")

run_service("small", ServiceSettings, build, lambda _settings: 2)
"""
WAIT_S = 60


def free_ports() -> tuple[int, int, int]:
    """A port for gRPC and two that follow each other."""
    while True:
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            first = two.getsockname()[1]
            try:
                three.bind(("127.0.0.1", first + 1))
            except (OSError, OverflowError):
                continue
            return one.getsockname()[1], first, first + 1


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def started(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int], int]]:
    """(the process that runs the others, their ids, port of gRPC)."""
    port, *metrics = free_ports()
    config = folder / "small.yaml"
    config.write_text(
        f"{{listen: '127.0.0.1:{port}', state_dir: s, telemetry: {{metrics_listen: '127.0.0.1:{metrics[0]}'}}}}"
    )
    command = [sys.executable, "-c", SERVICE, "--config", str(config)]
    with subprocess.Popen(command, cwd=folder) as parent:
        try:
            wait_until(lambda: all(map(is_ready, metrics)))
            yield parent, [int((folder / f"s_process-{number}").read_text()) for number in (0, 1)], port
        finally:
            parent.terminate()


def is_served(port: int) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def connections(pid: int, port: int) -> int:
    """Connections to `port` that a process holds, as the kernel lists them."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(link.readlink().name)
        except OSError:
            continue
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    local = f"{port:04X}"
    return sum(row[1].endswith(f":{local}") and row[3] == "01" and f"socket:[{row[9]}]" in inodes for row in rows)


def test_connections_are_spread_and_an_orderly_stop_ends_all(tmp_path: Path) -> None:
    with started(tmp_path) as (parent, pids, port):
        assert is_served(port)
        sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(32)]
        wait_until(lambda: all(connections(pid, port) > 0 for pid in pids))
        for one in sockets:
            one.close()
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(WAIT_S) == 0
        assert not any(map(is_alive, pids))


def test_one_that_dies_takes_the_others_along(tmp_path: Path) -> None:
    with started(tmp_path) as (parent, pids, _port):
        os.kill(pids[1], signal.SIGKILL)
        assert parent.wait(WAIT_S) == signal.SIGKILL
        assert not any(map(is_alive, pids))
