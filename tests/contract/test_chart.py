"""The charts: every key documented and checked, every file it renders taken by the program it is for, every object by Kubernetes."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import dashboards, schema
from cluster import binaries
from millrace_bootstrap.settings import BootstrapSettings
from millrace_console.settings import ConsoleSettings
from millrace_drift_monitor.settings import DriftSettings
from millrace_feature.settings import FeatureSettings
from millrace_inference_gateway.settings import GatewaySettings
from millrace_ingestion.settings import IngestionSettings
from millrace_kit.settings import Settings, load_settings
from millrace_registry.settings import RegistrySettings
from millrace_rollout_controller.settings import RolloutSettings
from millrace_training_coordinator.settings import TrainingSettings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "millrace"
CRDS = ROOT / "charts" / "millrace-crds"
DEPLOY = ROOT / "deploy" / "cluster"
CASES = [
    *((case,) for case in sorted((CHART / "ci").glob("*-values.yaml"))),
    (DEPLOY / "dev.yaml",),
    (DEPLOY / "production.yaml",),
    (DEPLOY / "production.yaml", DEPLOY / "gpu.yaml"),
]
NAMESPACE = "chart-test"
# Of other projects' operators; the control plane of tests does not have them.
FOREIGN = {"cert-manager.io", "monitoring.coreos.com", "keda.sh"}
TIMEOUT_S = 300
KINDS: dict[str, type[Settings]] = {
    "millrace-bootstrap": BootstrapSettings,
    "millrace-console": ConsoleSettings,
    "millrace-drift-monitor": DriftSettings,
    "millrace-feature": FeatureSettings,
    "millrace-inference-gateway": GatewaySettings,
    "millrace_inference_gateway.envoy_process": GatewaySettings,
    "millrace-ingestion": IngestionSettings,
    "millrace-registry": RegistrySettings,
    "millrace-rollout-controller": RolloutSettings,
    "millrace-training-coordinator": TrainingSettings,
}

Document = dict[str, Any]

pytestmark = pytest.mark.kubernetes


def run(*command: str | Path, stdin: str | None = None, kubeconfig: Path | None = None) -> str:
    environment = {**os.environ, **({"KUBECONFIG": str(kubeconfig)} if kubeconfig else {})}
    done = subprocess.run(
        [str(word) for word in command],
        check=False,
        capture_output=True,
        text=True,
        input=stdin,
        env=environment,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr[-3000:]}{done.stdout[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def helm() -> Path:
    return binaries.BIN / "helm"


def render(helm: Path, *case: Path, chart: Path = CHART) -> list[Document]:
    values = [word for file in case for word in ("-f", file)]
    version = binaries.KUBERNETES.removeprefix("v")
    text = run(helm, "template", "millrace", chart, "-n", NAMESPACE, "--kube-version", version, *values)
    return [document for document in yaml.safe_load_all(text) if document]


def cases() -> Iterator[Any]:
    for case in CASES:
        yield pytest.param(case, id="+".join(file.stem for file in case))


def test_schema_is_what_the_values_say() -> None:
    assert (CHART / "values.schema.json").read_text(encoding="utf-8") == schema.rendered()


def test_every_value_is_documented() -> None:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    comments = schema.descriptions(text.replace("# -- ", "# @"))
    documented = {path for path, comment in comments.items() if comment.startswith("@")}

    def leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if not isinstance(value, dict) or not value:
            yield path
            return
        for key, member in value.items():
            yield from leaves(member, (*path, key))

    def explained(path: tuple[str, ...]) -> bool:
        """By its own comment, or by that of a map it is written in; a service's by that of `defaults`."""
        places = [".".join(path[:length]) for length in range(1, len(path) + 1)]
        if path[0] in schema.SERVICES:
            places += [place.replace(path[0], schema.DEFAULTS, 1) for place in places[1:]]
        return any(place in documented for place in places)

    missing = [".".join(path) for path in leaves(yaml.safe_load(text), ()) if not explained(path)]
    assert missing == []


def test_every_key_of_the_schema_has_a_value() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    closed = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))

    def absent(node: Document, value: Any, default: Any, path: str) -> list[str]:
        found = []
        for key, inner in node.get("properties", {}).items():
            here = value.get(key) if isinstance(value, dict) else None
            fallback = default.get(key) if isinstance(default, dict) else None
            if here is None and fallback is None:
                found.append(f"{path}.{key}")
            elif "properties" in inner and path.count(".") < 3 and (here or fallback):
                found += absent(inner, here, fallback, f"{path}.{key}")
        return found

    problems = []
    for name, node in closed["properties"].items():
        if name != "global" and "properties" in node:
            default = values["defaults"] if name in schema.SERVICES else None
            problems += absent(node, values[name], default, name)
    # Members of Kubernetes' own structures, which have no default.
    own = (".resources.", "Resources.", ".issuerRef.")
    assert [problem for problem in problems if not any(part in problem for part in own)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        "ingestion.replica=2",
        "kafka.partition=3",
        "tls.issuer=nobody",
        "gateway.tls.mode=maybe",
        "images.pullPolicy=Sometimes",
        "registry.image.tagg=1",
        "registry.autoscaling.maxReplica=2",
        "modelServers.gpu.nodeselector.x=y",
        "networkpolicy.enabled=false",
    ],
)
def test_typing_errors_are_refused(helm: Path, wrong: str) -> None:
    command = [str(helm), "template", "millrace", str(CHART), "--kube-version", "1.34.0"]
    done = subprocess.run(
        [*command, "--set", f"dependencies.enabled=true,{wrong}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode != 0
    key = wrong.partition("=")[0].split(".")
    assert any(part in done.stderr for part in key[-2:]), done.stderr


def test_lint(helm: Path) -> None:
    for chart in (CHART, CRDS):
        run(helm, "lint", "--strict", chart, "--set", "" if chart == CRDS else "dependencies.enabled=true")


def test_unit_tests() -> None:
    run(binaries.BIN / "untt", "--strict", CHART)


def settings_files(documents: list[Document]) -> Iterator[tuple[list[str], str]]:
    """Every command of ours that reads a settings file, with the file as the pod sees it."""
    maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    for document in documents:
        for pod in pods_of(document):
            sources = {v["name"]: v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v}
            for container in [*pod.get("initContainers", []), *pod["containers"]]:
                command = container.get("command", [])
                if "--config" not in command:
                    continue
                path = command[command.index("--config") + 1]
                mount = next(m for m in container["volumeMounts"] if m["mountPath"] == path)
                yield command, maps[sources[mount["name"]]][mount["subPath"]]


def pods_of(document: Document) -> list[Document]:
    spec = document.get("spec") or {}
    if document["kind"] == "Pod":
        return [spec]
    if document["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    pod = spec.get("template", {}).get("spec") if isinstance(spec.get("template"), dict) else None
    return [pod] if pod and "containers" in pod else []


@pytest.mark.parametrize("case", cases())
def test_programs_take_their_files(helm: Path, case: tuple[Path, ...], tmp_path: Path) -> None:
    seen = set()
    for command, text in settings_files(render(helm, *case)):
        program = command[2] if command[0] == "python" else command[0]
        file = tmp_path / "config.yaml"
        file.write_text(text, encoding="utf-8")
        # As `--check` reads it; one process for all, because each would take seconds to start.
        load_settings(KINDS[program], file, tolerant=True)
        seen.add(program)
    assert seen == set(KINDS)


@pytest.mark.parametrize("case", cases())
def test_nothing_is_named_that_is_not_there(helm: Path, case: tuple[Path, ...]) -> None:
    """ConfigMaps, service accounts and claims that pods name are in the release; so are Secrets unless the values name them."""
    documents = render(helm, *case)
    there = {(d["kind"], d["metadata"]["name"]) for d in documents}
    given = "".join(file.read_text(encoding="utf-8") for file in case)
    for document in documents:
        for pod in pods_of(document):
            assert ("ServiceAccount", pod.get("serviceAccountName", "")) in there or "serviceAccountName" not in pod
            for volume in pod["volumes"]:
                sources = [volume, *volume.get("projected", {}).get("sources", [])]
                for source in sources:
                    if "configMap" in source:
                        assert ("ConfigMap", source["configMap"]["name"]) in there
                    secret = source.get("secret", {})
                    name = secret.get("secretName") or secret.get("name")
                    if name and not name.endswith("-tls"):
                        assert ("Secret", name) in there or name in given, name


def test_containers_are_confined(helm: Path) -> None:
    for document in render(helm, CHART / "ci" / "dependencies-values.yaml"):
        for pod in pods_of(document):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in [*pod.get("initContainers", []), *pod["containers"]]:
                where = f"{document['metadata']['name']}/{container['name']}"
                security = container["securityContext"]
                assert security["allowPrivilegeEscalation"] is False, where
                assert security["readOnlyRootFilesystem"] is True, where
                assert security["capabilities"] == {"drop": ["ALL"]}, where
                assert "cpu" not in container["resources"].get("limits", {}), where


def test_nobody_may_do_everything(helm: Path) -> None:
    for document in render(helm, CHART / "ci" / "dependencies-values.yaml"):
        assert document["kind"] not in {"ClusterRole", "ClusterRoleBinding"}, document["metadata"]["name"]
        if document["kind"] == "Role":
            for rule in document["rules"]:
                assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]], document["metadata"]["name"]


def test_a_first_try_fits_on_a_small_node(helm: Path) -> None:
    """Requests of the dependencies profile together: under one core and four GiB."""
    cpu = memory = 0
    for document in render(helm, CHART / "ci" / "dependencies-values.yaml"):
        if document["kind"] not in {"Deployment", "StatefulSet"}:
            continue
        for container in document["spec"]["template"]["spec"]["containers"]:
            requests = container["resources"]["requests"]
            cpu += int(requests["cpu"].removesuffix("m")) * document["spec"]["replicas"]
            memory += int(requests["memory"].removesuffix("Mi")) * document["spec"]["replicas"]
    assert cpu <= 1000
    assert memory <= 4096


@pytest.mark.prometheus
def test_alerts() -> None:
    promtool = "promtool"
    run(promtool, "check", "rules", CHART / "alerts" / "millrace.yaml")
    run(promtool, "test", "rules", CHART / "alerts" / "tests" / "millrace.yaml")


def test_every_alert_is_tested() -> None:
    rules = yaml.safe_load((CHART / "alerts" / "millrace.yaml").read_text(encoding="utf-8"))
    tests = (CHART / "alerts" / "tests" / "millrace.yaml").read_text(encoding="utf-8")
    names = [rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert [name for name in names if f'alertname="{name}"' not in tests] == []


def test_signals_in_alerts_and_dashboards_exist() -> None:
    """A metric that no code exports makes an alert that never fires and a panel that stays empty."""
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("services", "libs")
        for path in (ROOT / folder).rglob("src/**/*.py")
    )
    used = dashboards.metrics_in((CHART / "alerts" / "millrace.yaml").read_text(encoding="utf-8"))
    for path in (CHART / "dashboards").glob("*.json"):
        used |= dashboards.metrics_in(path.read_text(encoding="utf-8"))
    suffixes = ("_total", "_bucket", "_sum", "_count")

    def exported(name: str) -> bool:
        stems = [name, *(name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix))]
        return any(f'"{stem}"' in code for stem in stems)

    assert used
    assert sorted(name for name in used if not exported(name)) == []


def test_dashboards_are_what_the_tables_say() -> None:
    for name, text in dashboards.rendered().items():
        assert (CHART / "dashboards" / name).read_text(encoding="utf-8") == text


def test_rendered_rules_are_the_files(helm: Path, tmp_path: Path) -> None:
    documents = render(helm, CHART / "ci" / "production-values.yaml")
    (rule,) = [document for document in documents if document["kind"] == "PrometheusRule"]
    expected = yaml.safe_load((CHART / "alerts" / "millrace.yaml").read_text(encoding="utf-8"))
    assert rule["spec"]["groups"] == expected["groups"]


@pytest.fixture(scope="module")
def namespace(control_plane: Path, helm: Path) -> Path:
    """The kubeconfig, with the custom resources installed and a namespace made."""
    text = yaml.safe_dump_all(render(helm, chart=CRDS))
    run("kubectl", "apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text, kubeconfig=control_plane)
    made = yaml.safe_dump({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    run("kubectl", "apply", "-f", "-", stdin=made, kubeconfig=control_plane)
    return control_plane


@pytest.mark.kubernetes
@pytest.mark.parametrize("case", cases())
def test_kubernetes_takes_every_object(helm: Path, namespace: Path, case: tuple[Path, ...]) -> None:
    documents = [d for d in render(helm, *case) if d["apiVersion"].partition("/")[0] not in FOREIGN]
    # A pod's service account is looked up even when the pod is only tried.
    accounts = yaml.safe_dump_all(d for d in documents if d["kind"] == "ServiceAccount")
    run("kubectl", "apply", "-n", NAMESPACE, "--server-side", "-f", "-", stdin=accounts, kubeconfig=namespace)
    command = ["kubectl", "apply", "-n", NAMESPACE, "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"]
    answer = run(*command, stdin=yaml.safe_dump_all(documents), kubeconfig=namespace)
    assert len(answer.splitlines()) == len(documents)
