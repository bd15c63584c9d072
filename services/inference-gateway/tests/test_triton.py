"""The gateway before a real Triton: its health protocol, its answers, its end."""

import contextlib
import json
import math
import tempfile
import urllib.request
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from gateway import FEATURES, MODEL, Gateway, arm, eventually, gateway, route
from tritonclient.grpc.aio import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

pytest.importorskip("millrace_rollout_controller", reason="a real Triton is started by the rollout controller's code")
pytest.importorskip("onnx")


async def test_real_triton() -> None:
    from direct_calls import counted_once_each
    from real_triton import triton

    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gw-")))
        width = len(FEATURES)
        at_first, first = await stack.enter_async_context(triton(folder, width, "t0"))
        at_second, _ = await stack.enter_async_context(triton(folder, width, "t1"))
        g, rollout = await stack.enter_async_context(gateway(max_zero_hop_clients=1))
        await rollout.in_force(rollout.set(route(arm("1.0.0", at_first, at_second))))
        assert healthy(g) == {at_first, at_second}

        client = InferenceServerClient(g.public)
        row = InferInput("features", [1, width], "FP32")
        row.set_data_from_numpy(np.array([[1, 2, 3]], np.float32))
        (expected,) = (await client.infer(MODEL, [row])).as_numpy("probability")[0].tolist()
        answer = await g.predict("flight", a=1.0, b=2.0, c=3.0)
        assert answer.outputs[0] == pytest.approx(expected)
        assert 0 < expected < 1
        await counted_once_each(g, rollout, (at_first, at_second), client, row)
        assert await client.is_model_ready(MODEL)

        await a_wrong_call_is_its_callers_fault(g, client)

        first.kill()
        for _ in range(50):
            assert (await client.infer(MODEL, [row])).as_numpy("probability")[0].tolist() == [expected]
        await client.close()


async def a_wrong_call_is_its_callers_fault(g: Gateway, client: InferenceServerClient) -> None:
    """Unmodified clients are told what is wrong by Triton itself, and the version is not blamed."""

    def tensor(
        name: str = "features", shape: tuple[int, ...] = (1, len(FEATURES)), kind: type = np.float32
    ) -> InferInput:
        made = InferInput(name, list(shape), np_to_triton_dtype(kind))
        made.set_data_from_numpy(np.ones(shape, kind))
        return made

    width = len(FEATURES)
    wrong = {
        "type": ([tensor(kind=np.int64)], "FP32"),
        "width": ([tensor(shape=(1, width + 1))], "shape"),
        "rank": ([tensor(shape=(width,))], "shape"),
        "name": ([tensor(name="nobody")], "nobody"),
        "too many": ([tensor(), tensor(name="more")], "input"),
        "none": ([], "input"),
    }
    before = await g.figures()
    assert before is not None
    told: dict[str, tuple[str, str, int, str]] = {}
    async with aiohttp.ClientSession() as session:
        for kind, (inputs, _said) in wrong.items():
            with pytest.raises(InferenceServerException) as caught:
                await client.infer(MODEL, inputs)
            async with session.post(f"http://{g.public}/v2/models/{MODEL}/infer", json=as_json(inputs)) as answer:
                by_http = answer.status, (await answer.json())["error"]
            told[kind] = caught.value.status(), caught.value.message(), *by_http
        for kind, (_inputs, said) in wrong.items():
            by_grpc, message, by_http, text = told[kind]
            assert (by_grpc, by_http) == ("StatusCode.INVALID_ARGUMENT", HTTPStatus.BAD_REQUEST), told
            assert said in message, told
            assert said in text, told
        output = InferRequestedOutput("nobody")
        with pytest.raises(InferenceServerException, match="nobody"):
            await client.infer(MODEL, [tensor()], outputs=[output])

    async def counted() -> bool:
        after = await g.figures()
        return after is not None and after.versions[0].requests >= before.versions[0].requests + 2 * len(wrong)

    await eventually(counted, "the wrong calls in the figures")
    after = await g.figures()
    assert after is not None
    assert after.versions[0].errors == before.versions[0].errors == 0


def as_json(inputs: Sequence[InferInput]) -> dict[str, object]:
    tensors = [
        {"name": i.name(), "shape": list(i.shape()), "datatype": i.datatype(), "data": [1] * math.prod(i.shape())}
        for i in inputs
    ]
    return {"inputs": tensors}


def healthy(g: object) -> set[str]:
    admin = g.settings.envoy_admin_listen  # type: ignore[attr-defined]
    with urllib.request.urlopen(f"http://{admin}/clusters?format=json", timeout=5) as response:
        clusters = json.load(response)["cluster_statuses"]
    hosts = next(c for c in clusters if c["name"].startswith("arm/"))["host_statuses"]
    found = [h for h in hosts if not h["health_status"].get("failed_active_health_check")]
    return {
        f"{h['address']['socket_address']['address']}:{h['address']['socket_address']['port_value']}" for h in found
    }
