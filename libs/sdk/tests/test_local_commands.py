"""Commands of the local run, where no service has to answer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest
import yaml
from click.testing import CliRunner
from millrace.cli import main
from millrace.cli.local import Context


def test_in_a_folder_that_is_no_checkout_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, ["--state-dir", str(tmp_path / "run"), "up"])
    assert found.exit_code == 1
    assert "requirements.lock is not in" in found.output
    assert not (tmp_path / "run").exists()


class Applying:
    """A client that remembers what was applied."""

    def __init__(self) -> None:
        self.applied: list[str] = []
        self.rollout = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        return

    def apply(self, manifest: str) -> object:
        self.applied.append(yaml.safe_load(manifest)["metadata"]["name"])
        return SimpleNamespace(deployment=SimpleNamespace(name=self.applied[-1]), result="created")


def test_all_manifests_are_applied_and_none_when_one_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Applying()
    monkeypatch.setattr(Context, "client", lambda _self: client)
    (tmp_path / "a.yaml").write_text("metadata: {name: a}\n---\nmetadata: {name: b}\n")
    (tmp_path / "c.yaml").write_text("metadata: {name: c}\n")
    (tmp_path / "broken.yaml").write_text("metadata: {name: [\n")
    files = [tmp_path / "a.yaml", tmp_path / "c.yaml"]
    found = CliRunner().invoke(main, ["apply", *(part for file in files for part in ("-f", str(file)))])
    assert found.exit_code == 0, found.output
    assert client.applied == ["a", "b", "c"]
    broken = ["apply", "-f", str(tmp_path / "a.yaml"), "-f", str(tmp_path / "broken.yaml")]
    found = CliRunner().invoke(main, broken)
    assert found.exit_code == 1
    assert "broken.yaml: while parsing" in found.output
    assert client.applied == ["a", "b", "c"]
