"""Versions in the same pods: what the pods look like, what they should hold, and where each version is."""

from typing import Any

from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.kubernetes import names, objects, order, sharing
from millrace_rollout_controller.kubernetes.loaders import Held
from millrace_rollout_controller.kubernetes.settings import KubernetesSettings, ModelServerSettings
from millrace_rollout_controller.kubernetes.sharing import InPod
from millrace_rollout_controller.plans import ArmSeen, Refusal
from millrace_rollout_controller.server_block import Server

from .support import version_ref

SERVERS = ModelServerSettings()
OWNER: dict[str, Any] = {"metadata": {"name": "delay", "uid": "u"}}
HELD = Held(loaded=True, ready=True)


def wanted(*versions: str, replicas: int = 1, **server: Any) -> list[Wanted]:
    block = Server.model_validate({"placement": "Shared", **server})
    return [Wanted("delay", version_ref(version, version.encode()), replicas, block) for version in versions]


def group(*versions: str, **server: Any) -> sharing.Group:
    (found,) = sharing.apart(wanted(*versions, **server))[1]
    return found


def held(found: order.Orders) -> list[str]:
    return [one.ref.version for one in found.versions]


def test_orders_follow_what_is_wanted_and_what_gateways_may_still_use() -> None:
    first = sharing.orders(group("1.0.0"), None, None, SERVERS, 1000)
    assert (first.revision, held(first)) == (1000, ["1.0.0"])
    assert sharing.orders(group("1.0.0"), first, frozenset(), SERVERS, 2000) is first, "nothing changed"
    both = sharing.orders(group("1.0.0", "1.1.0"), first, frozenset(), SERVERS, 900)
    assert (both.revision, held(both)) == (1001, ["1.0.0", "1.1.0"]), "a clock that went back makes no older revision"
    # Promoted: the old one stays while a gateway may send calls for it, or while that is not known.
    for used in (frozenset({"1.0.0"}), None):
        assert held(sharing.orders(group("1.1.0"), both, used, SERVERS, 3000)) == ["1.1.0", "1.0.0"]
    assert held(sharing.orders(group("1.1.0"), both, frozenset({"1.1.0"}), SERVERS, 3000)) == ["1.1.0"]
    assert order.Orders.model_validate_json(both.model_dump_json()) == both


def test_calls_in_use_are_those_to_these_pods() -> None:
    pods = [{"metadata": {"name": "a"}, "status": {"podIP": ip}} for ip in ("10.0.0.1", "fd00::1")]
    places = {
        "10.0.0.1:8001",
        "10.0.0.1:8001/1.0.0",
        "[fd00::1]:8001/flight-delay/1.1.0",
        "10.0.0.9:8001/1.2.0",
    }
    assert sharing.in_use_inside(pods, places) == frozenset({"1.0.0", "1.1.0"})
    assert sharing.in_use_inside(pods, None) is None


def test_a_version_is_where_ready_pods_hold_it() -> None:
    base = ArmSeen(("a:1", "b:1"), 3, None, "ml/delay-shared:8001")
    ready = {"a:1": "a", "b:1": "b"}
    refused = Held(loaded=False, ready=False, refusal=Refusal("InsufficientMemory", "no room", permanent=False))
    pods = [
        InPod("a", {"1.0.0": HELD, "1.1.0": HELD, "0.9.0": HELD}),
        InPod("b", {"1.0.0": HELD, "1.1.0": refused}),
        # Holds it, and takes no calls yet.
        InPod("c", {"1.0.0": HELD}, "UNAVAILABLE"),
    ]
    found = sharing.arms(base, ["1.0.0", "1.1.0"], ready, pods)
    assert found["1.0.0"].ready == ("a:1", "b:1")
    assert found["1.0.0"].refusal == Refusal("LoaderUnreachable", "loader of pod c: UNAVAILABLE", permanent=False)
    assert (found["1.1.0"].ready, found["1.1.0"].refusal) == (("a:1",), refused.refusal)
    assert {found[version].service for version in ("1.0.0", "1.1.0")} == {base.service}
    # One that is not wanted counts while its memory is taken.
    assert (found["0.9.0"].servers, found["1.1.0"].servers) == (1, 3)


def build(*versions: str, **server: Any) -> dict[str, Any]:
    found = group(*versions, **server)
    orders = sharing.orders(found, None, None, SERVERS, 1)
    return {item["kind"]: item for item in objects.build(found.want, OWNER, KubernetesSettings(), orders)}


def test_the_pod_is_the_same_whatever_it_holds() -> None:
    one, two = build("1.0.0"), build("1.1.0", "1.0.0", memoryMib=900)
    assert one["ConfigMap"] != two["ConfigMap"]
    assert one["Deployment"] == two["Deployment"]
    changed = build("1.0.0", maxBatchSize=8)["Deployment"]["spec"]["template"]
    assert changed != one["Deployment"]["spec"]["template"], "a new configuration needs new pods"
    name = names.object_name("delay", names.SHARED)
    assert {item["metadata"]["name"] for item in one.values()} == {name}
    pod = one["Deployment"]["spec"]["template"]["spec"]
    assert "initContainers" not in pod
    assert pod["shareProcessNamespace"] is True
    assert pod["automountServiceAccountToken"] is False
    triton, loader = pod["containers"]
    assert "--model-control-mode=explicit" in triton["args"]
    assert triton["readinessProbe"]["httpGet"]["path"] == "/v2/models/flight-delay/ready"
    assert loader["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "loader-probes"}
    # Another user: what runs in the server sees neither the loader's keys nor its variables.
    assert loader["securityContext"]["runAsUser"] != pod["securityContext"]["runAsUser"]
    assert loader["securityContext"]["readOnlyRootFilesystem"] is True
    assert {"name": "orders", "configMap": {"name": name}} in pod["volumes"]
