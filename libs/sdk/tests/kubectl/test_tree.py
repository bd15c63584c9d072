"""What people see of a rollout: one folder a scenario (the resource, its pods, and the tree as it must be)."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from millrace.kubectl import objects
from millrace.kubectl.printing import coloured
from millrace.kubectl.watching import outcome
from millrace.tree import plain, rollout_tree
from rich.console import Console

SCENARIOS = sorted(path for path in (Path(__file__).parent / "scenarios").iterdir() if path.is_dir())
NOW = datetime(2026, 1, 2, tzinfo=UTC)
OUTCOMES = {"promoted": "done", "rolled_back": "failed", "refused": "failed"}


def _tree(folder: Path):
    item = yaml.safe_load((folder / "deployment.yaml").read_text(encoding="utf-8"))
    pods = yaml.safe_load((folder / "pods.yaml").read_text(encoding="utf-8"))
    return rollout_tree(objects.deployment(item), objects.pods(pods), NOW)


@pytest.mark.parametrize("folder", SCENARIOS, ids=lambda path: path.name)
def test_tree(folder: Path) -> None:
    assert plain(_tree(folder)) + "\n" == (folder / "expected.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", SCENARIOS, ids=lambda path: path.name)
def test_a_terminal_shows_the_same_lines(folder: Path) -> None:
    console = Console(width=500, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(coloured(_tree(folder)))
    assert [line.rstrip() for line in capture.get().splitlines()] == plain(_tree(folder)).splitlines()


@pytest.mark.parametrize("folder", SCENARIOS, ids=lambda path: path.name)
def test_outcome(folder: Path) -> None:
    item = yaml.safe_load((folder / "deployment.yaml").read_text(encoding="utf-8"))
    assert outcome(objects.deployment(item)).state == OUTCOMES.get(folder.name, "moving")


def test_an_old_status_says_nothing_about_a_new_spec() -> None:
    folder = Path(__file__).parent / "scenarios" / "promoted"
    item = yaml.safe_load((folder / "deployment.yaml").read_text(encoding="utf-8"))
    item["metadata"]["generation"] += 1
    found = outcome(objects.deployment(item))
    assert found.state == "moving"
    assert "newest spec" in found.text
