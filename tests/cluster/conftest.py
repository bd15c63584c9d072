"""The release under test: made once for all tests of this folder, on the cluster that `make cluster` brought up."""

import time
from collections.abc import Generator
from pathlib import Path

import pytest
from cluster import __main__ as throwaway

from tests.cluster.release import NAMESPACE, RELEASE, ROOT, Release

INSTALL_TIMEOUT_S = 900
# What needs a fresh release comes first, what kills it late, what removes it last.
ORDER = ("install", "rollouts", "placement", "training", "loop", "faults", "upgrade")
SHOWN_EVENTS = 15
TROUBLE = ("Failed", "BackOff", "Unhealthy", "Evicted", "Killing", "NotReady", "Error", "Warning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs the real cluster, takes long, and has its turn."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.cluster)
        item.add_marker(pytest.mark.timeout(1500))
    ordered = iter(sorted(here, key=lambda item: ORDER.index(item.path.stem.removeprefix("test_"))))
    items[:] = [next(ordered) if item in here else item for item in items]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the cluster as it is then: what is not Ready, and the last events that speak of trouble."""
    report = yield
    release = item.funcargs.get("release") if isinstance(item, pytest.Function) else None
    if report.failed and isinstance(release, Release):
        report.sections.append(("the cluster", _state(release)))
    return report


def _state(release: Release) -> str:
    def lines(*command: str) -> list[str]:
        done = release.call("kubectl", "-n", release.namespace, *command, timeout_s=20)
        return (done.stdout or done.stderr).splitlines()

    nodes = lines("get", "nodes", "--no-headers")
    pods = [
        line
        for line in lines("get", "pods", "--no-headers", "-o", "wide")
        if len(words := line.split()) < 3 or (words[2] != "Completed" and len(set(words[1].split("/"))) > 1)
    ]
    events = [
        line for line in lines("get", "events", "--sort-by=.lastTimestamp") if any(word in line for word in TROUBLE)
    ]
    return "\n".join([*nodes, "pods that are not Ready:", *pods, "events:", *events[-SHOWN_EVENTS:]])


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """`helm install` from nothing with the dependencies profile; every pod is Ready when it returns."""
    made = Release(throwaway.KUBECONFIG, tmp_path_factory.mktemp("release"))
    done = made.call("kubectl", "create", "namespace", NAMESPACE)
    assert done.returncode == 0 or "AlreadyExists" in done.stderr, done.stderr
    installed = made.call("helm", "-n", NAMESPACE, "status", RELEASE)
    if installed.returncode:
        began = time.monotonic()
        made.helm("upgrade", "--install", "millrace-crds", str(ROOT / "charts" / "millrace-crds"))
        values = str(ROOT / "tests" / "cluster" / "values.yaml")
        timeout = f"{INSTALL_TIMEOUT_S}s"
        made.helm("install", RELEASE, str(ROOT / "charts" / "millrace"), "-f", values, "--wait", "--timeout", timeout)
        print(f"\nhelm install took {time.monotonic() - began:.0f} s")
    return made
