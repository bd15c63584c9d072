"""Starts a server under a guard, waits until it answers, stops it by pid."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
LOG_TAIL_BYTES = 4000
PORTS = range(11_000, 21_000)
_CHANCE = random.SystemRandom()
_GIVEN: set[int] = set()


class PartError(Exception):
    """A part that is missing here or did not start; the message says what to install or shows its log."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    """For example "kafka"."""
    address: str
    """How a client reaches it: `host:port` or a URL."""
    guard_pid: int
    """Process to signal; it ends the server and itself."""
    server_pid: int
    """The server itself, for tests that kill it."""
    folder: str
    """What it keeps, and its log."""

    def save(self, path: Path) -> None:
        """Write where it is, whole or not at all."""
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(self)), encoding="utf-8")
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Server":
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def alive(self) -> bool:
        """Whether the process is there."""
        return _alive(self.server_pid)

    def kill(self) -> None:
        """End it without a goodbye; its folder stays, so that it can be started again on what it kept."""
        os.kill(self.server_pid, signal.SIGKILL)
        self._wait_for_guard()

    def stop(self) -> None:
        """End it and remove its folder."""
        if _alive(self.guard_pid):
            os.kill(self.guard_pid, signal.SIGTERM)
            self._wait_for_guard()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_for_guard(self) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _alive(self.guard_pid) and time.monotonic() < deadline:
            _reap(self.guard_pid)
            time.sleep(0.02)


def start(
    name: str,
    command: Sequence[str],
    *,
    address: str,
    folder: Path,
    ready: Callable[[], bool],
    owner_pid: int,
    stop_signal: signal.Signals = signal.SIGKILL,
    user: str = "",
    environment: Mapping[str, str] | None = None,
) -> Server:
    """Run `command` until `owner_pid` is gone or the server is stopped; returns once `ready` is true.

    Raises:
        PartError: it ended or did not become ready in time; the message has the end of its log.
    """
    log = folder / "server.log"
    pid_file = folder / "server.pid"
    guard = [sys.executable, str(Path(__file__).with_name("guard.py"))]
    guard += [str(owner_pid), str(int(stop_signal)), str(pid_file), user, *command]
    with log.open("ab") as output:
        process = subprocess.Popen(
            guard,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PartError(f"{name} ended while starting:\n{_tail(log)}")
        if pid_file.exists() and ready():
            return Server(name, address, process.pid, int(pid_file.read_text(encoding="ascii")), str(folder))
        time.sleep(0.1)
    process.terminate()
    raise PartError(f"{name} was not ready within {START_TIMEOUT_S:g} s:\n{_tail(log)}")


def free_port() -> int:
    """A TCP port of loopback that nothing uses now, another one at every call.

    It lies below the ports that the kernel gives to whoever asks for any, so that nothing takes it before the server that it is for.
    """
    for port in _CHANCE.sample(PORTS, len(PORTS)):
        if port in _GIVEN:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _GIVEN.add(port)
        return port
    raise PartError(f"no free port from {PORTS.start} to {PORTS.stop}")


def listening(port: int) -> bool:
    """Whether something accepts connections on the port of loopback."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tail(log: Path) -> str:
    return log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # one that ended and was not waited for still has its number
    return not stat.exists() or stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] != "Z"


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return  # another process started it
