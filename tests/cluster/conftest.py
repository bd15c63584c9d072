"""The release under test: made once for all tests of this folder, on the cluster that `make cluster` brought up."""

import time
from pathlib import Path

import pytest
from cluster import __main__ as throwaway

from tests.cluster.release import NAMESPACE, RELEASE, ROOT, Release

INSTALL_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs the real cluster and takes long."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(1500))


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
