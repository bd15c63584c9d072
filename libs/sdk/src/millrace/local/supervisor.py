"""Starts the processes of a table, keeps them running and stops them in order.

A process that dies is started again after a growing pause. What is running stands in `<state>/up.json`, so that `millrace status`
and `millrace down` find it, and so that a later start can end what a killed supervisor left behind.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from millrace.local.health import is_healthy
from millrace.local.processes import Process

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
# A process that lived this long starts with the first pause again.
SETTLED_S = 10.0
STOP_TIMEOUT_S = 25.0
POLL_S = 0.1

Report = Callable[[str, str], None]


class LocalRunError(Exception):
    """The local run cannot start; the message says what to do."""


@dataclass
class _Running:
    process: Process
    popen: subprocess.Popen[bytes]
    started: float
    pause_s: float = FIRST_PAUSE_S
    restarts: int = 0
    restart_at: float | None = None
    log: Path = field(default_factory=Path)


class Supervisor:
    """Runs a process table below `state_dir`.

    Args:
        table: the processes in starting order.
        state_dir: folder of the run.
        report: called with (process, what happened).
    """

    def __init__(self, table: Sequence[Process], state_dir: Path, report: Report = lambda _name, _what: None) -> None:
        self._table = table
        self._state_dir = state_dir
        self._report = report
        self._running: dict[str, _Running] = {}
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def state_file(self) -> Path:
        """Where the running processes are written down."""
        return self._state_dir / "up.json"

    def start(self) -> None:
        """Start everything and wait until it answers.

        Raises:
            LocalRunError: a run is up already, a port is taken, or a process did not get healthy; nothing is left running then.
        """
        for folder in ("config", "logs", "traces"):
            (self._state_dir / folder).mkdir(parents=True, exist_ok=True)
        end_leftovers(self.state_file)
        self._check_ports()
        try:
            for process in self._table:
                self._write_config(process)
                self._launch(process)
            self._write_state()
            for process in self._table:
                self._wait_healthy(process)
        except BaseException:
            self.stop()
            raise
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._watcher.start()

    def _check_ports(self) -> None:
        for process in self._table:
            for port in process.ports:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        probe.bind(("127.0.0.1", port))
                    except OSError:
                        message = f"port {port} ({process.name}) is taken; free it or choose others with --port-base"
                        raise LocalRunError(message) from None

    def _write_config(self, process: Process) -> None:
        path = self._state_dir / "config" / process.config_file
        path.write_text(yaml.safe_dump(dict(process.settings), sort_keys=False), encoding="utf-8")

    def _launch(self, process: Process, before: _Running | None = None) -> None:
        config = str(self._state_dir / "config" / process.config_file)
        command = [part.replace("{config}", config) for part in process.command]
        log = self._state_dir / "logs" / f"{process.name}.log"
        with log.open("ab" if before else "wb") as output:
            # Its own session: a Ctrl-C at the terminal reaches only the supervisor, which stops the rest in order.
            popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        running = _Running(process, popen, time.monotonic(), log=log)
        if before is not None:
            running.restarts = before.restarts + 1
            running.pause_s = before.pause_s
        with self._lock:
            self._running[process.name] = running

    def _wait_healthy(self, process: Process) -> None:
        deadline = time.monotonic() + process.start_timeout_s
        while True:
            running = self._running[process.name]
            if running.popen.poll() is not None:
                raise LocalRunError(f"{process.name} ended with {running.popen.returncode}:\n{tail(running.log)}")
            if is_healthy(process):
                self._report(process.name, f"ready on {process.address}")
                return
            if time.monotonic() > deadline:
                message = f"{process.name} did not answer within {process.start_timeout_s:.0f} s:\n{tail(running.log)}"
                raise LocalRunError(message)
            time.sleep(POLL_S)

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_S):
            now = time.monotonic()
            with self._lock:
                runs = list(self._running.values())
            for running in runs:
                if running.restart_at is None and running.popen.poll() is not None:
                    if now - running.started > SETTLED_S:
                        running.pause_s = FIRST_PAUSE_S
                    running.restart_at = now + running.pause_s
                    what = f"ended with {running.popen.returncode}; starts again in {running.pause_s:.1f} s"
                    self._report(running.process.name, what)
                    running.pause_s = min(LONGEST_PAUSE_S, running.pause_s * 2)
                elif running.restart_at is not None and now >= running.restart_at:
                    self._launch(running.process, running)
                    self._write_state()

    def pid(self, name: str) -> int:
        """Process id of a running process."""
        with self._lock:
            return self._running[name].popen.pid

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal (for fault tests); returns the process id it went to."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def wait_restarted(self, name: str, old_pid: int, timeout_s: float = LONGEST_PAUSE_S + 60) -> None:
        """Wait until `name` runs under another process id and answers.

        Raises:
            LocalRunError: it did not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            running = self._running[name]
            if running.popen.pid != old_pid and running.popen.poll() is None and is_healthy(running.process):
                return
            time.sleep(POLL_S)
        raise LocalRunError(f"{name} did not come back within {timeout_s:.0f} s:\n{tail(self._running[name].log)}")

    def _write_state(self) -> None:
        with self._lock:
            rows = [
                {
                    "name": running.process.name,
                    "pid": running.popen.pid,
                    "created": _created(running.popen.pid),
                    "address": running.process.address,
                    "health": running.process.health,
                    "health_path": running.process.health_path,
                    "restarts": running.restarts,
                    "log": str(running.log),
                }
                for running in self._running.values()
            ]
        content = {"supervisor": {"pid": os.getpid(), "created": _created(os.getpid())}, "processes": rows}
        scratch = self.state_file.with_suffix(".new")
        scratch.write_text(json.dumps(content, indent=1), encoding="utf-8")
        scratch.replace(self.state_file)

    def stop(self) -> None:
        """Stop every process, last started first; kill what does not stop in time."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
        for process in reversed(self._table):
            running = self._running.get(process.name)
            if running is None or running.popen.poll() is not None:
                continue
            running.popen.terminate()
            try:
                running.popen.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._report(process.name, f"did not stop within {STOP_TIMEOUT_S:.0f} s; killed")
                running.popen.kill()
                running.popen.wait()
        self.state_file.unlink(missing_ok=True)


def _created(pid: int) -> float:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return 0.0


def same_process(pid: int, created: float) -> bool:
    """Whether `pid` still is the process that was made at `created` (seconds of the epoch)."""
    return abs(_created(pid) - created) < 1.0


def end_leftovers(state_file: Path) -> None:
    """End processes that a killed supervisor left running.

    Raises:
        LocalRunError: their supervisor is alive: a run is up.
    """
    try:
        content = json.loads(state_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return
    supervisor = content["supervisor"]
    if supervisor["pid"] != os.getpid() and same_process(supervisor["pid"], supervisor["created"]):
        message = f"a local run is up already (process {supervisor['pid']}); `millrace down` stops it"
        raise LocalRunError(message)
    left = [psutil.Process(row["pid"]) for row in content["processes"] if same_process(row["pid"], row["created"])]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _gone, alive = psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)
    for process in alive:
        process.kill()
    state_file.unlink(missing_ok=True)


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
