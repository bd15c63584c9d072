"""`helm upgrade` and `helm rollback` under load, then `helm uninstall`; last in this folder, because nothing is left afterwards."""

from collections.abc import Iterator

import pytest
from millrace import Client

from tests.cluster import models
from tests.cluster.load import Load
from tests.cluster.release import RELEASE, ROOT, Release, eventually

CHART = str(ROOT / "charts" / "millrace")
VALUES = str(ROOT / "tests" / "cluster" / "values.yaml")


@pytest.fixture(scope="module")
def client(release: Release) -> Iterator[Client]:
    with release.client() as made:
        yield made


def test_upgrade_rollback_and_uninstall(release: Release, client: Client) -> None:
    name = release.fresh("upgrade")
    models.create(client, name, ("1.0.0",))
    release.apply(models.manifest(name, "1.0.0", server={"replicas": 2}))
    release.wait_stable(name, "1.0.0")
    revision = release.helm("history", RELEASE, "-o", "json")
    with Load(release.address("gateway"), name, models.WIDTH, rate=20) as load:
        load.wait_for(20)
        # Every pod of ours is replaced.
        changed = ["-f", VALUES, "--set", "commonPodAnnotations.test=upgrade", "--wait", "--timeout", "600s"]
        release.helm("upgrade", RELEASE, CHART, *changed)
        load.wait_for(40)
        release.helm("rollback", RELEASE, "--wait", "--timeout", "600s")
        load.wait_for(40)
        assert release.helm("history", RELEASE, "-o", "json") != revision
    assert load.errors == []
    release.helm("uninstall", RELEASE, "--wait", "--timeout", "300s")
    crds = release.kubectl("get", "crd", "modeldeployments.millrace.dev", "-o", "name")
    assert "modeldeployments" in crds
    assert release.get("modeldeployments")["items"], "people's ModelDeployments stay"
    claims = release.get("pvc")["items"]
    assert {"kafka", "postgres"} <= {part for claim in claims for part in claim["metadata"]["name"].split("-")}
    gone = f"app.kubernetes.io/instance={RELEASE}"
    eventually("pods are gone", lambda: not release.pods(gone) or None, 120)
