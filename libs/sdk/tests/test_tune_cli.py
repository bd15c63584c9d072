"""`millrace tune` as far as the SDK goes: it hands the tuner its settings and options, and its exit code on."""

import signal
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from millrace.cli import tuning
from millrace.cli.main import main


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.yaml"
    path.write_text("kind: ModelDeployment\n")
    return path


def test_options_go_on_and_the_exit_code_comes_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, manifest: Path
) -> None:
    monkeypatch.setattr(tuning, "find_spec", lambda name: object())
    commands: list[list[str]] = []
    monkeypatch.setattr(tuning, "_run", lambda command: commands.append(command) or 1)
    words = [
        "--state-dir",
        str(tmp_path / "state"),
        "--port-base",
        "21000",
        "tune",
        "-f",
        str(manifest),
        "--p99",
        "20ms",
    ]
    tls = {"cert": "c.pem", "key": "k.pem", "ca": "ca.pem"}
    environment = {"MILLRACE_REGISTRY_ADDRESS": "registry.example:1"}
    environment |= {f"MILLRACE_TLS_{name.upper()}": file for name, file in tls.items()}
    ended = CliRunner().invoke(main, [*words, "--write", "--requests", str(manifest)], env=environment)
    assert ended.exit_code == 1, ended.output
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "millrace_rollout_controller.tuning"]
    assert {"--p99=20ms", "--budget=5m", "--write", f"--requests={manifest}"} <= set(command)
    assert not any(word.startswith(("--json", "--output", "--max-instances", "--min-batch-size")) for word in command)
    settings = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())
    assert settings["registry_address"] == "registry.example:1"
    assert settings["tls"] == {f"{name}_file": file for name, file in tls.items()}
    assert settings["gateway_addresses"] == ["127.0.0.1:21005"]
    assert settings["state_dir"] == str((tmp_path / "state" / "rollout-controller").resolve())


def test_wrong_use_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch, manifest: Path) -> None:
    monkeypatch.setattr(tuning, "find_spec", lambda name: object())
    both = ["tune", "-f", str(manifest), "--p99", "20ms", "--write", "--output", "x.yaml"]
    assert CliRunner().invoke(main, both).exit_code == 2
    monkeypatch.setattr(tuning, "find_spec", lambda name: None)
    ended = CliRunner().invoke(main, ["tune", "-f", str(manifest), "--p99", "20ms"])
    assert ended.exit_code == 2
    assert "needs the services on this machine" in ended.output


def test_who_ends_the_command_ends_the_tuner_and_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tuner:
        """Until it is told to end, only a signal ends the wait for it."""

        def __init__(self, command: list[str]) -> None:
            self.told = self.waited = False
            made.append(self)

        def wait(self) -> int:
            if not self.told:
                raise KeyboardInterrupt
            self.waited = True
            return 130

        def terminate(self) -> None:
            self.told = True

    made: list[Tuner] = []
    monkeypatch.setattr(tuning.subprocess, "Popen", Tuner)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert tuning._run(["tuner"]) == tuning.INTERRUPTED
        assert signal.getsignal(signal.SIGTERM) is not before, "SIGTERM ends it like Ctrl-C"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert made[0].waited
