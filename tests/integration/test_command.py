"""`millrace up` and `millrace down` as a person uses them, from two terminals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.stack import eventually, free_port_base

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.mark.parametrize("how", ["down", "ctrl-c"])
def test_up_and_down(tmp_path: Path, how: str) -> None:
    command = [
        str(Path(sys.executable).parent / "millrace"), "--port-base", str(free_port_base()), "--state-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        up = subprocess.Popen([*command, "up"], stdout=log, stderr=subprocess.STDOUT)

    def ready() -> bool | None:
        assert up.poll() is None, (tmp_path / "log").read_text()
        return "\nup after" in (tmp_path / "log").read_text() or None

    eventually("everything is up", ready, 120)
    state = json.loads((tmp_path / "run" / "up.json").read_text())
    pids = [row["pid"] for row in state["processes"]]
    assert all(psutil.pid_exists(pid) for pid in pids)
    second = subprocess.run([*command, "up"], capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert "is up already" in second.stderr
    if how == "down":
        subprocess.run([*command, "down"], check=True, timeout=120)
    else:
        os.kill(up.pid, signal.SIGINT)
    assert up.wait(120) == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert "stopped" in (tmp_path / "log").read_text()
