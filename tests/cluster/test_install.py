"""A release from nothing: everything Ready, `helm test` passes, and nobody without a certificate is let in."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.cluster.release import PORTS, RELEASE, Release


def test_every_pod_is_ready(release: Release) -> None:
    pods = release.pods(f"app.kubernetes.io/instance={RELEASE}")
    running = [pod for pod in pods if pod["status"]["phase"] == "Running"]
    assert {service for service, _ in PORTS.values() if service != "gateway"} <= {
        pod["metadata"]["labels"].get("app.kubernetes.io/component", "") for pod in running
    }
    assert release.unready() == []


def test_containers_are_confined(release: Release) -> None:
    for pod in release.pods(f"app.kubernetes.io/instance={RELEASE}"):
        for container in pod["spec"]["containers"]:
            security = {**pod["spec"].get("securityContext", {}), **container.get("securityContext", {})}
            where = f"{pod['metadata']['name']}/{container['name']}"
            assert security.get("runAsNonRoot") is True, where
            assert security.get("allowPrivilegeEscalation") is False, where
            assert security.get("capabilities", {}).get("drop") == ["ALL"], where
            assert security.get("readOnlyRootFilesystem") is True, where


def test_helm_test_passes(release: Release) -> None:
    assert "Phase:          Succeeded" in release.helm("test", RELEASE, "--timeout", "180s")


@pytest.mark.parametrize("area", [area for area in PORTS if area != "gateway"])
def test_services_refuse_callers_without_a_certificate(release: Release, area: str) -> None:
    with grpc.insecure_channel(release.address(area)) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert refused.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    with release.client() as client:
        channel = client._channels[area]
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
