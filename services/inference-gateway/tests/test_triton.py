"""The gateway before a real Triton: its health protocol, its answers, its end."""

import contextlib
import json
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from gateway import FEATURES, MODEL, arm, gateway, route
from tritonclient.grpc.aio import InferenceServerClient, InferInput

pytest.importorskip("millrace_rollout_controller", reason="a real Triton is started by the rollout controller's code")
pytest.importorskip("onnx")


async def test_real_triton() -> None:
    from real_triton import triton

    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gw-")))
        width = len(FEATURES)
        at_first, first = await stack.enter_async_context(triton(folder, width, "t0"))
        at_second, _ = await stack.enter_async_context(triton(folder, width, "t1"))
        g, rollout = await stack.enter_async_context(gateway())
        await rollout.in_force(rollout.set(route(arm("1.0.0", at_first, at_second))))
        assert healthy(g) == {at_first, at_second}

        client = InferenceServerClient(g.public)
        row = InferInput("features", [1, width], "FP32")
        row.set_data_from_numpy(np.array([[1, 2, 3]], np.float32))
        (expected,) = (await client.infer(MODEL, [row])).as_numpy("probability")[0].tolist()
        answer = await g.predict("flight", a=1.0, b=2.0, c=3.0)
        assert answer.outputs[0] == pytest.approx(expected)
        assert 0 < expected < 1
        assert await client.is_model_ready(MODEL)

        first.kill()
        for _ in range(50):
            assert (await client.infer(MODEL, [row])).as_numpy("probability")[0].tolist() == [expected]
        await client.close()


def healthy(g: object) -> set[str]:
    admin = g.settings.envoy_admin_listen  # type: ignore[attr-defined]
    with urllib.request.urlopen(f"http://{admin}/clusters?format=json", timeout=5) as response:
        clusters = json.load(response)["cluster_statuses"]
    hosts = next(c for c in clusters if c["name"].startswith("arm/"))["host_statuses"]
    found = [h for h in hosts if not h["health_status"].get("failed_active_health_check")]
    return {
        f"{h['address']['socket_address']['address']}:{h['address']['socket_address']['port_value']}" for h in found
    }
