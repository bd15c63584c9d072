"""The main job, as the README gives it: the whole loop on the real flights, ended by its own exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stack import ROOT, free_port_base

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1600)]


def test_the_loop_turns(tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "millrace"), "--port-base", str(free_port_base()), "--state-dir", str(tmp_path / "run"),
        "demo", "--exit",
    ]  # fmt: skip
    log = ROOT / "build" / "demo.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=1500,
            check=False,
            env={**os.environ, "NO_COLOR": "1"},
        )
    text = log.read_text(errors="replace")
    assert done.returncode == 0, text[-6000:]
    for step in range(1, 10):
        assert f"\n{step}. " in text, f"step {step} is missing"
    failed = next(line for line in text.splitlines() if line.strip().startswith("failed client requests"))
    assert failed.split()[-1] == "0"
