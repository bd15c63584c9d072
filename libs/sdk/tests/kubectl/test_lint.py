"""`lint` against the CRD's schema and rules: one file a rule; and against the real API server, which must say the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from millrace.kubectl import schema
from millrace.kubectl.commands import root
from millrace.kubectl.lint import lint

ROOT = Path(__file__).parents[4]
FOLDER = Path(__file__).parent / "manifests"
VALID = sorted((FOLDER / "valid").glob("*.yaml"))
INVALID = sorted((FOLDER / "invalid").glob("*.yaml"))


def expected(path: Path) -> str:
    """The field that a file's first line names."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# field: ")


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_valid(path: Path) -> None:
    assert list(lint(path.read_text(encoding="utf-8"), schema.crd())) == []


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_invalid_names_the_field(path: Path) -> None:
    found = list(lint(path.read_text(encoding="utf-8"), schema.crd()))
    assert expected(path) in [finding.field for finding in found], [str(finding) for finding in found]


def test_a_rule_that_is_no_rule_is_told_with_the_place() -> None:
    """The API server takes it, and the controller does not."""
    text = (FOLDER / "valid" / "rules-of-attributes.yaml").read_text(encoding="utf-8")
    (found,) = lint(text.replace("features['delay_7d'] > 12.5", "features['delay_7d'] > 'much'"), schema.crd())
    assert found.field == "spec.routing.rules[1].when"
    assert "found a text at character 49" in found.message


def test_samples_are_valid() -> None:
    for path in sorted(ROOT.glob("deploy/**/manifests/*.yaml")):
        assert list(lint(path.read_text(encoding="utf-8"), schema.crd())) == [], path


FITTING = {"object": {}, "array": [], "string": "1s", "number": 1.5, "integer": 1}


def _rules(node: Any) -> Iterator[tuple[str, Any]]:
    """Every rule, with a value of the type it is about."""
    if isinstance(node, dict):
        yield from ((one["rule"], FITTING[node["type"]]) for one in node.get("x-kubernetes-validations", ()))
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _rules(child)


def _trouble(rule: str, value: Any) -> str:
    try:
        schema.holds(rule, value)
    except Exception as error:
        return str(error)
    return ""


def test_every_rule_of_the_crd_is_understood_offline() -> None:
    """A function that only Kubernetes' CEL has must be given to ours."""
    rules = [(rule, value) for rule, value in _rules(schema.crd()) if "oldSelf" not in rule]
    assert len(rules) > 20
    assert [f"{rule}: {said}" for rule, value in rules if "function" in (said := _trouble(rule, value))] == []
    assert "function" in _trouble("self.noSuchFunction()", "x")


def test_exit_codes(tmp_path: Path) -> None:
    run = CliRunner().invoke
    good, bad = str(VALID[0]), str(INVALID[0])
    assert run(root, ["lint", good]).exit_code == 0
    wrong = run(root, ["lint", good, bad])
    assert wrong.exit_code == 1
    assert f"{bad}: {expected(INVALID[0])}: " in wrong.stdout
    assert run(root, ["lint", str(tmp_path / "none.yaml")]).exit_code == 2
    assert run(root, ["lint"]).exit_code == 2


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "x\0"])
def test_what_is_no_manifest_is_said_not_raised(text: str) -> None:
    assert list(lint(text, schema.crd()))


def test_several_documents_are_told_apart() -> None:
    bad = INVALID[0].read_text(encoding="utf-8")
    found = list(lint(f"{VALID[0].read_text(encoding='utf-8')}\n---\n{bad}", schema.crd()))
    assert all(finding.field.startswith("document 2: ") for finding in found)
