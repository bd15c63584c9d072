"""What every Dockerfile promises: no root, no torch but in the trainer, a health check, labels, no file of another service."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
from cluster import images

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted([*ROOT.glob("services/*/Dockerfile"), *ROOT.glob("deploy/images/*/Dockerfile")])
SERVICES = sorted(path.parent.name for path in ROOT.glob("services/*/pyproject.toml"))
REQUIREMENTS = runpy.run_path(str(ROOT / "deploy/images/requirements.py"))["requirements"]


def _name(dockerfile: Path) -> str:
    return dockerfile.parent.name


def _final(dockerfile: Path) -> list[str]:
    """Instructions of the last stage, each on one line."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    start = max(number for number, line in enumerate(lines) if line.startswith("FROM "))
    return lines[start:]


def _projects(dockerfile: Path) -> list[dict[str, object]]:
    """Packages whose dependencies the image installs."""
    folders = set()
    for line in _final(dockerfile):
        if found := re.search(r"install\.sh (.*)$", line):
            folders |= set(found[1].split())
    assert folders, f"{dockerfile} installs no dependencies"
    return [
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"] for folder in folders
    ]


def test_every_service_has_an_image() -> None:
    assert set(SERVICES) <= {_name(path) for path in DOCKERFILES}
    assert {*SERVICES, "trainer", "triton-cpu"} == set(images.IMAGES)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=_name)
def test_runs_without_root_and_says_what_it_is(dockerfile: Path) -> None:
    final = _final(dockerfile)
    users = [line for line in final if line.startswith("USER ")]
    assert users == ["USER 65532:65532"]
    assert not any(line.startswith("RUN ") for line in final[final.index(users[0]) :])
    labels = " ".join(line for line in final if line.startswith("LABEL "))
    assert f'org.opencontainers.image.title="millrace/{_name(dockerfile)}"' in labels
    assert 'org.opencontainers.image.version="${VERSION}"' in labels
    assert "image.source" not in labels
    assert f"ARG VERSION={images.VERSION}" in final


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=_name)
def test_has_a_health_check(dockerfile: Path) -> None:
    checks = [line for line in _final(dockerfile) if line.startswith("HEALTHCHECK ")]
    expected = {"trainer": "NONE", "triton-cpu": "http://127.0.0.1:8000/v2/health/ready"}
    assert len(checks) == 1
    assert expected.get(_name(dockerfile), "http://127.0.0.1:9090/readyz") in checks[0]


@pytest.mark.parametrize("name", SERVICES)
def test_starts_its_own_program_with_the_mounted_settings(name: str) -> None:
    final = _final(ROOT / "services" / name / "Dockerfile")
    project = tomllib.loads((ROOT / "services" / name / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f'ENTRYPOINT ["millrace-{name}"]' in final
    assert f"millrace-{name}" in project["scripts"]
    assert 'CMD ["--config", "/etc/millrace/config.yaml"]' in final


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=_name)
def test_only_the_trainer_carries_torch(dockerfile: Path) -> None:
    found = {re.split(r"[\[<>=~! ;]", text)[0] for text in REQUIREMENTS(_projects(dockerfile))}
    assert ("torch" in found) == (_name(dockerfile) == "trainer")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=_name)
def test_holds_no_other_service(dockerfile: Path) -> None:
    allowed = {_name(dockerfile)} | ({"training-coordinator"} if _name(dockerfile) == "trainer" else set())
    mentioned = set(re.findall(r"services/([a-z-]+)", dockerfile.read_text(encoding="utf-8")))
    assert mentioned <= allowed


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=_name)
def test_code_does_not_come_before_dependencies(dockerfile: Path) -> None:
    """Dependencies are decided by pyproject.toml files and the lock alone, so that a change of code keeps their layers."""
    for line in _final(dockerfile):
        if "install.sh" in line:
            sources = re.findall(r"--mount=source=([^,]+)", line)
            assert "requirements.lock" in sources
            assert all(s in {"requirements.lock", "deploy/images"} or s.endswith("/pyproject.toml") for s in sources)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=_name)
def test_needs_no_other_frontend(dockerfile: Path) -> None:
    text = dockerfile.read_text(encoding="utf-8")
    assert not text.lower().lstrip().startswith("# syntax")
    assert "ARG PYTHON_IMAGE=python:3.11-slim-bookworm" in text


def test_extras_asked_for_between_packages_are_resolved() -> None:
    kit = {
        "name": "millrace-kit",
        "dependencies": ["grpcio"],
        "optional-dependencies": {"s3": ["s3fs"], "postgres": ["psycopg"]},
    }
    service = {"name": "millrace-x", "dependencies": ["millrace-kit[s3]", "numpy"]}
    assert REQUIREMENTS([kit, service]) == ["grpcio", "numpy", "s3fs"]
    assert REQUIREMENTS([kit], ["millrace-kit[postgres,s3]"]) == ["grpcio", "psycopg", "s3fs"]


def test_an_image_is_built_again_when_something_in_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*images.SHARED, "services/x/Dockerfile", "services/x/src/a.py", "services/x/tests/test_a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1", encoding="utf-8")
    monkeypatch.setattr(images, "ROOT", tmp_path)
    image = images.Image("x:1", tmp_path / "services/x/Dockerfile", (*images.SHARED, "services/x"))
    before = image.key()
    (tmp_path / "services/x/tests/test_a.py").write_text("2", encoding="utf-8")
    assert image.key() == before
    (tmp_path / "services/x/src/a.py").write_text("2", encoding="utf-8")
    assert image.key() != before


def test_nothing_that_a_package_asks_for_is_overridden_away() -> None:
    lines = (ROOT / "deploy/images/overrides.txt").read_text(encoding="utf-8").splitlines()
    dropped = {re.split(r"[ ;]", line)[0] for line in lines if line and not line.startswith("#")}
    assert dropped
    for path in [*ROOT.glob("services/*/pyproject.toml"), *ROOT.glob("libs/*/pyproject.toml")]:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        asked = {re.split(r"[\[ <>=~!;]", text)[0] for text in project["dependencies"]}
        assert not asked & dropped, f"{path.parent.name} would come without {asked & dropped} in its image"
