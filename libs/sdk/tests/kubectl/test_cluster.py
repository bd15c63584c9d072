"""The plugin against a real API server with the chart's CRD. The controller is a thread that answers as the real one does."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self
from uuid import uuid4

import pytest
import yaml
from click.testing import CliRunner, Result
from kubernetes.client import ApiClient
from millrace.kubectl import actions, schema
from millrace.kubectl.cluster import Cluster, ClusterError, Object
from millrace.kubectl.commands import root

pytestmark = pytest.mark.kubernetes
MANIFESTS = Path(__file__).parent / "manifests"
SCENARIO = Path(__file__).parent / "scenarios" / "canary" / "deployment.yaml"
NAME = "flight-delay"
OTHERS = {"name-missing", "version-of-api", "status-given", "other-kind"}
"""Not about the schema of one object."""
COMPARED = sorted(path for path in MANIFESTS.glob("*/*.yaml") if path.stem not in OTHERS)


class Controller:
    """Answers each new nonce: Done, but refuses `abort`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.asked: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            item = self._cluster.deployment(NAME)
            text = item["metadata"].get("annotations", {}).get(actions.ANNOTATION, "")
            if text and text not in self.asked:
                self.asked.append(text)
                verb, *_others, nonce = text.split()
                refused = verb == "abort"
                answer = {
                    "id": nonce,
                    "verb": verb,
                    "result": "Refused" if refused else "Done",
                    "message": "no rollout" if refused else "",
                }
                set_status(self._cluster, {"lastAction": answer})


def set_status(cluster: Cluster, status: Object) -> None:
    """As the controller writes it: by the subresource."""
    cluster._call("PATCH", f"{cluster._path()}/{NAME}/status", {}, {"status": status}, "application/merge-patch+json")


@pytest.fixture(scope="module")
def kubeconfig(control_plane: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    crd = tmp_path_factory.mktemp("crd") / "crd.yaml"
    crd.write_text(yaml.safe_dump(schema.crd()), encoding="utf-8")
    kubectl = ["kubectl", "--kubeconfig", str(control_plane)]
    subprocess.run([*kubectl, "apply", "--server-side", "--force-conflicts", "-f", str(crd)], check=True, timeout=60)
    names = "crd/modeldeployments.millrace.dev"
    # A condition cannot be waited for before there are any, on a busy machine.
    for what in ("jsonpath={.status.acceptedNames.kind}=ModelDeployment", "condition=Established"):
        subprocess.run([*kubectl, "wait", f"--for={what}", names, "--timeout=60s"], check=True, timeout=70)
    return control_plane


@pytest.fixture
def cluster(kubeconfig: Path) -> Iterator[Cluster]:
    found = Cluster.connect(str(kubeconfig), None, f"plugin-{uuid4().hex[:8]}")
    item = yaml.safe_load(SCENARIO.read_text(encoding="utf-8"))
    found._call("POST", "/api/v1/namespaces", {}, {"metadata": {"name": found.namespace}})
    body = {**item, "metadata": {"name": NAME}}
    found._call("POST", found._path(), {}, body)
    status = dict(item["status"])
    status["observedGeneration"] = 1
    set_status(found, status)
    yield found
    found._call("DELETE", f"/api/v1/namespaces/{found.namespace}")
    found.close()


@pytest.fixture
def run(cluster: Cluster, kubeconfig: Path):
    def invoke(*words: str) -> Result:
        return CliRunner().invoke(root, [*words, "-n", cluster.namespace, "--kubeconfig", str(kubeconfig)])

    return invoke


def test_verbs_are_one_patch_each_and_wait_for_their_answer(cluster: Cluster, run) -> None:
    with Controller(cluster) as controller:
        for words in (["pause"], ["resume"], ["promote"]):
            done = run(*words, NAME)
            assert done.exit_code == 0, done.output
            assert f"modeldeployment.millrace.dev/{NAME} {words[0]}" in done.stdout
        assert run("set-weight", NAME, "35.5").exit_code == 0
        assert [text.split()[:-1] for text in controller.asked] == [
            ["pause"],
            ["resume"],
            ["promote"],
            ["set-weight", "35.5"],
        ]
        refused = run("abort", NAME)
        assert refused.exit_code == 1
        assert "no rollout" in refused.stderr


def test_undo_changes_the_version_in_the_same_patch(cluster: Cluster, run) -> None:
    before = cluster.deployment(NAME)["metadata"]["generation"]
    with Controller(cluster):
        assert run("undo", NAME).exit_code == 0
    item = cluster.deployment(NAME)
    assert item["spec"]["version"] == "1.2.0"
    assert item["metadata"]["generation"] == before + 1
    assert item["metadata"]["annotations"][actions.ANNOTATION].startswith("undo ")


def test_undo_without_a_previous_version_is_refused_before_anything_changes(cluster: Cluster, run) -> None:
    set_status(cluster, {"previousVersion": ""})
    before = cluster.deployment(NAME)["metadata"]["resourceVersion"]
    assert run("undo", NAME).exit_code == 1
    assert cluster.deployment(NAME)["metadata"]["resourceVersion"] == before


def test_no_controller_is_a_timeout(run) -> None:
    done = run("pause", NAME, "--timeout", "0.5")
    assert done.exit_code == 3
    assert "did not answer" in done.stderr


def test_what_does_not_exist_and_what_is_wrong_are_told_apart(run) -> None:
    assert run("get", "nobody").exit_code == 1
    assert run("pause", "nobody").exit_code == 1
    assert run("set-weight", NAME, "101").exit_code == 2
    assert run("get", "-w").exit_code == 2


def test_an_api_server_that_is_away_fails_within_its_deadline(tmp_path: Path, kubeconfig: Path) -> None:
    config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    done = CliRunner().invoke(root, ["list", "--kubeconfig", str(path)])
    assert done.exit_code == 1
    assert "does not answer" in done.stderr
    missing = CliRunner().invoke(root, ["list", "--kubeconfig", str(path), "--context", "nowhere"])
    assert missing.exit_code == 1


def test_outputs(cluster: Cluster, run) -> None:
    assert run("get", NAME).stdout.startswith(f"◌ {NAME}  Progressing")
    assert run("list", "-o", "name").stdout == f"modeldeployment.millrace.dev/{NAME}\n"
    item = json.loads(run("get", NAME, "-o", "json").stdout)
    assert item["metadata"]["name"] == NAME
    assert "managedFields" not in item["metadata"]
    assert yaml.safe_load(run("list", "-o", "yaml").stdout)["items"][0]["spec"] == item["spec"]
    header, row = run("list").stdout.splitlines()
    assert header.split() == ["NAME", "READY", "STABLE", "CANDIDATE", "WEIGHT", "STEP", "AGE"]
    assert row.split()[:6] == [NAME, "True", "1.3.0", "1.4.0", "20%", "2/4"]
    assert "PHASE" in run("list", "-o", "wide").stdout


def test_all_namespaces(cluster: Cluster, kubeconfig: Path) -> None:
    shown = CliRunner().invoke(root, ["list", "-A", "--kubeconfig", str(kubeconfig)])
    assert shown.stdout.splitlines()[0].split()[0] == "NAMESPACE"
    assert cluster.namespace in shown.stdout


def test_status_waits_until_the_rollout_is_over(cluster: Cluster, run) -> None:
    moving = run("status", NAME)
    assert moving.exit_code == 0
    assert "1.4.0 at 20%" in moving.stdout
    assert run("status", NAME, "--watch", "--timeout", "0.5").exit_code == 3
    done = {"phase": "Promoted", "candidateVersion": "", "weight": 0}
    later = threading.Timer(0.5, set_status, (cluster, done))
    later.start()
    promoted = run("status", NAME, "--watch", "--timeout", "30")
    assert promoted.exit_code == 0, promoted.output
    assert promoted.stdout.splitlines()[-1].startswith(f"{NAME}: Promoted")
    conditions = cluster.deployment(NAME)["status"]["conditions"]
    worse = [
        one | {"status": "True", "reason": "GateFailed"} if one["type"] == "Degraded" else one for one in conditions
    ]
    set_status(cluster, {"phase": "RolledBack", "conditions": worse})
    assert run("status", NAME).exit_code == 1


def test_get_w_prints_a_line_a_change_until_the_deployment_is_gone(cluster: Cluster, run) -> None:
    def change() -> None:
        set_status(cluster, {"weight": 50, "step": 3})
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and cluster.deployment(NAME)["status"]["weight"] != 50:
            time.sleep(0.05)
        threading.Timer(2, cluster._call, ("DELETE", f"{cluster._path()}/{NAME}")).start()

    threading.Timer(0.5, change).start()
    watched = run("get", NAME, "-w")
    assert "was deleted" in watched.stderr
    rows = watched.stdout.splitlines()[1:]
    assert [row.split()[4] for row in rows] == ["20%", "50%"]


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_api_server_says_what_offline_lint_says(path: Path, cluster: Cluster) -> None:
    from millrace.kubectl import lint

    text = path.read_text(encoding="utf-8")
    offline = list(lint.lint(text, schema.crd()))
    online = list(lint.on_server(text, cluster))
    assert bool(offline) == bool(online), f"offline {offline}, API server {online}"


def test_lint_asks_about_one_that_exists(cluster: Cluster, run, tmp_path: Path) -> None:
    item = cluster.deployment(NAME)
    item = {key: item[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": {"name": NAME}}
    item["spec"]["model"] = "another"
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(item), encoding="utf-8")
    assert run("lint", str(path), "--server").stdout.startswith(f"{path}: spec.model: ")
    assert cluster.deployment(NAME)["spec"]["model"] == NAME


def test_without_kubeconfig_and_pod_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ClusterError):
        Cluster.connect(str(tmp_path / "none"), None, None)
    assert isinstance(Cluster(ApiClient(), "x").namespace, str)
