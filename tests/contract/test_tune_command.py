"""What `millrace tune` hands to the rollout controller's tuner: the SDK knows no service, so only here both are together."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from millrace.cli import tuning
from millrace.cli.main import main
from millrace_kit.settings import load_settings
from millrace_rollout_controller.settings import RolloutSettings
from millrace_rollout_controller.tuning import command


def handed_over(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> tuple[command.Options, Path, bool]:
    manifest = folder / "manifest.yaml"
    manifest.touch()
    commands: list[list[str]] = []
    monkeypatch.setattr(tuning, "_run", lambda made: commands.append(made) or 0)
    words = ["--state-dir", str(folder / "state"), "tune", "-f", str(manifest), "--p99", "20ms", *more]
    ended = CliRunner().invoke(main, words)
    assert ended.exit_code == 0, ended.output
    return command.arguments(commands[0][3:])


def test_the_tuner_takes_what_it_is_given_and_means_the_same_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options, config, as_json = handed_over(monkeypatch, tmp_path)
    assert options == command.Options(tmp_path / "manifest.yaml", 20.0)
    assert not as_json
    assert load_settings(RolloutSettings, config).registry_address.endswith("7403")


def test_every_option_arrives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requests, output = tmp_path / "manifest.yaml", tmp_path / "tuned.yaml"
    given = {
        "--budget": "90s", "--max-concurrency": "8", "--max-instances": "3", "--max-trials": "5", "--min-batch-size": "4",
        "--requests": str(requests), "--window": "250ms", "--min-requests": "40", "--stability": "20", "--output": str(output),
    }  # fmt: skip
    known = {
        option for parameter in tuning.tune.params if isinstance(parameter, click.Option) for option in parameter.opts
    }
    assert known - set(given) == {"-f", "--filename", "--p99", "--write", "--json"}
    options, _, as_json = handed_over(
        monkeypatch, tmp_path, "--json", *(word for pair in given.items() for word in pair)
    )
    method = command.Method(0.25, 40, share=0.2)
    assert options == command.Options(
        requests, 20.0, 90.0, 8, 3, 5, 4, requests, method, write=False, output=output
    )  # fmt: skip
    assert as_json
