"""Start, restart, leftovers and stop, with small real processes."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from millrace.local.processes import Process
from millrace.local.supervisor import LocalRunError, Supervisor
from parts.server import free_port

SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *_): pass
http.server.HTTPServer.allow_reuse_address = True
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def process(name: str, code: str = SERVER) -> Process:
    port = free_port()
    command = [sys.executable, "-c", code, str(port)]
    return Process(name, command, {"a": 1}, "http", f"127.0.0.1:{port}", ports=(port,), start_timeout_s=20)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_start_restart_stop(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    supervisor = Supervisor([process("a"), process("b")], tmp_path, lambda name, what: said.append((name, what)))
    supervisor.start()
    try:
        assert (tmp_path / "config" / "a.yaml").read_text() == "a: 1\n"
        old = supervisor.kill("a")
        supervisor.wait_restarted("a", old)
        assert supervisor.pid("a") != old
        assert any(name == "a" and "starts again" in what for name, what in said)
        pids = [row["pid"] for row in json.loads(supervisor.state_file.read_text())["processes"]]
        assert sorted(pids) == sorted([supervisor.pid("a"), supervisor.pid("b")])
    finally:
        supervisor.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not supervisor.state_file.exists()


def test_a_process_that_ends_at_start_is_reported_with_its_log(tmp_path: Path) -> None:
    good = process("good")
    supervisor = Supervisor([good, process("bad", "import sys; sys.exit('no such thing')")], tmp_path)
    with pytest.raises(LocalRunError, match="no such thing"):
        supervisor.start()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", good.ports[0]))


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    taken = process("a")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", taken.ports[0]))
        holder.listen()
        with pytest.raises(LocalRunError, match=f"port {taken.ports[0]}"):
            Supervisor([taken], tmp_path).start()


def test_what_a_killed_supervisor_left_is_ended(tmp_path: Path) -> None:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    row = {"name": "a", "pid": left.pid, "created": psutil.Process(left.pid).create_time()}
    (tmp_path / "up.json").write_text(json.dumps({"supervisor": {"pid": 1, "created": 0.0}, "processes": [row]}))
    supervisor = Supervisor([process("a")], tmp_path)
    supervisor.start()
    try:
        eventually(lambda: left.poll() is not None)
    finally:
        supervisor.stop()


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    created = psutil.Process(other.pid).create_time()
    (tmp_path / "up.json").write_text(
        json.dumps({"supervisor": {"pid": other.pid, "created": created}, "processes": []})
    )
    try:
        with pytest.raises(LocalRunError, match="is up already"):
            Supervisor([process("a")], tmp_path).start()
    finally:
        os.kill(other.pid, 9)
        other.wait()
