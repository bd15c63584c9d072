"""Every settings file a local run writes is accepted by the service it is for, offline; a wrong key is refused by name."""

import subprocess
from pathlib import Path

import pytest
import yaml
from millrace.local.processes import Process, process_table

TABLE = process_table(Path("/state"), 9000, Path("/lock"))


def check(process: Process, settings: dict[str, object], folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [*(part.replace("{config}", str(path)) for part in process.command), "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("process", [p for p in TABLE if p.name != "envoy"], ids=lambda p: p.name)
def test_settings(process: Process, tmp_path: Path) -> None:
    done = check(process, dict(process.settings), tmp_path)
    assert done.returncode == 0, done.stderr
    done = check(process, {**process.settings, "no_such_key": 1}, tmp_path)
    assert done.returncode == 2
    assert "no_such_key" in done.stderr
