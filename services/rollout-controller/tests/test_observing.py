"""What counts as a server of a version: a ready pod of the Deployment that is there now, and that stays."""

from typing import Any

import pytest
from millrace_rollout_controller.kubernetes import names, observing

NAME = "delay-1-0-0"


def _object(name: str, created: str, **metadata: Any) -> dict[str, Any]:
    labels = {names.DEPLOYMENT_LABEL: "delay"}
    annotations = {names.VERSION_ANNOTATION: "1.0.0"}
    own = {"name": name, "labels": labels, "annotations": annotations, "creationTimestamp": created}
    return {"metadata": own | metadata, "status": {"phase": "Running"}}


def _slice(*pods: str) -> dict[str, Any]:
    endpoints = [
        {"addresses": [f"10.0.0.{number}"], "conditions": {"ready": True}, "targetRef": {"kind": "Pod", "name": pod}}
        for number, pod in enumerate(pods, 1)
    ]
    labels = {"kubernetes.io/service-name": NAME}
    return {
        "metadata": {"name": NAME, "labels": labels},
        "endpoints": endpoints,
        "ports": [{"name": "grpc", "port": 8001}],
    }


@pytest.mark.parametrize(
    ("workload", "pod", "counts"),
    [
        (_object(NAME, "2026-01-01T00:00:05Z"), _object("one", "2026-01-01T00:00:05Z"), True),
        # Of the Deployment that had this name before.
        (_object(NAME, "2026-01-01T00:00:05Z"), _object("one", "2026-01-01T00:00:04Z"), False),
        (
            _object(NAME, "2026-01-01T00:00:05Z"),
            _object("one", "2026-01-01T00:00:06Z", deletionTimestamp="2026-01-01T00:01:00Z"),
            False,
        ),
        (
            _object(NAME, "2026-01-01T00:00:05Z", deletionTimestamp="2026-01-01T00:01:00Z"),
            _object("one", "2026-01-01T00:00:06Z"),
            False,
        ),
        (None, _object("one", "2026-01-01T00:00:06Z"), False),
    ],
)
def test_a_ready_pod_on_its_way_out_is_no_server(
    workload: dict[str, Any] | None, pod: dict[str, Any], counts: bool
) -> None:
    workloads = {NAME: workload} if workload is not None else {}
    found = observing.arms("ml", workloads, {"one": pod}, {NAME: _slice("one")})
    assert found["delay", "1.0.0"].ready == (("10.0.0.1:8001",) if counts else ())
    assert found["delay", "1.0.0"].servers == 1
