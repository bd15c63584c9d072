"""V2 over HTTP, REST and gRPC-Web through the real Envoy, with the real Triton where the thing is the protocol."""

import asyncio
import base64
import contextlib
import json
import struct
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from gateway import CANDIDATE, FEATURES, MODEL, arm, eventually, gateway, on_the_bus, route
from load import infer_request
from millrace_api.prediction.v1 import prediction_pb2
from tritonclient.grpc import service_pb2

pytest.importorskip("millrace_rollout_controller", reason="a real Triton is started by the rollout controller's code")
pytest.importorskip("onnx")
WIDTH = len(FEATURES)


def http_call(url: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data=body, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def json_body(rows: int = 1) -> bytes:
    tensor = {"name": "features", "shape": [rows, WIDTH], "datatype": "FP32", "data": [1.0, 2.0, 3.0] * rows}
    return json.dumps({"inputs": [tensor]}).encode()


@contextlib.asynccontextmanager
async def with_triton(*names: str, **changes: object):
    from real_triton import triton

    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gw-")))
        addresses = [(await stack.enter_async_context(triton(folder, WIDTH, name)))[0] for name in names]
        g, rollout = await stack.enter_async_context(gateway(**changes))
        yield g, rollout, addresses


async def http_ready(g) -> None:
    """Envoy knows the servers' HTTP side a moment after their gRPC side."""
    url = f"http://{g.public}/v2/models/{MODEL}/ready"

    async def ready() -> bool:
        return (await asyncio.to_thread(http_call, url))[0] == 200

    await eventually(ready, "the model is ready by HTTP")


def use_http_client(url: str) -> dict[str, object]:
    """What an unmodified `tritonclient.http` finds; blocking, in a thread of its own."""
    import tritonclient.http as http_client

    client = http_client.InferenceServerClient(url)
    try:
        tensor = http_client.InferInput("features", [2, WIDTH], "FP32")
        tensor.set_data_from_numpy(np.array([[1, 2, 3], [4, 5, 6]], np.float32), binary_data=True)
        in_json = http_client.InferInput("features", [2, WIDTH], "FP32")
        in_json.set_data_from_numpy(np.array([[1, 2, 3], [4, 5, 6]], np.float32), binary_data=False)
        wanted = [http_client.InferRequestedOutput("probability", binary_data=False)]
        gzip = {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}
        return {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "server": client.get_server_metadata()["name"],
            "index": client.get_model_repository_index(),
            "model_ready": client.is_model_ready(MODEL),
            "version_ready": client.is_model_ready(MODEL, "1.0.0"),
            "metadata": client.get_model_metadata(MODEL)["inputs"][0]["name"],
            "config": client.get_model_config(MODEL)["name"],
            "statistics": client.get_inference_statistics(MODEL)["model_stats"][0]["name"],
            "binary": client.infer(MODEL, [tensor]).as_numpy("probability").tolist(),
            "json": client.infer(MODEL, [in_json], outputs=wanted).as_numpy("probability").tolist(),
            "packed": client.infer(MODEL, [tensor], **gzip).as_numpy("probability").tolist(),
            "unknown": _error(lambda: client.infer("nobody", [tensor])),
            "load": _error(lambda: client.load_model(MODEL)),
        }
    finally:
        client.close()


def _error(call) -> str:
    from tritonclient.utils import InferenceServerException

    try:
        call()
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}"
    return ""


async def test_unmodified_http_client() -> None:
    async with with_triton("t0") as (g, rollout, (address,)):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        await http_ready(g)
        found = await asyncio.to_thread(use_http_client, g.public)
        assert (found["live"], found["ready"], found["model_ready"]) == (True, True, True)
        assert found["server"] == "millrace-inference-gateway"
        assert found["index"] == [{"name": MODEL, "version": "1.0.0", "state": "READY"}]
        assert (found["metadata"], found["config"], found["statistics"]) == ("features", MODEL, MODEL)
        assert found["binary"] == found["packed"] == pytest.approx(np.array(found["json"]))
        assert np.array(found["binary"]).shape == (2, 1)
        assert found["unknown"].startswith("404 unknown model")
        assert found["load"].startswith("404 ")
        # Three calls of two rows each, whatever form they had.
        rows = await on_the_bus(g, 6)
        assert [
            list(r.features) for r in sorted(rows, key=lambda r: (r.prediction_id.endswith(".1"), r.prediction_id))
        ] == [[1.0, 2.0, 3.0]] * 3 + [[4.0, 5.0, 6.0]] * 3
        expected = {round(row[0], 5) for row in found["binary"]}
        assert {round(r.outputs[0], 5) for r in rows} == expected
        figures = await g.figures()
        (version,) = figures.versions
        assert (version.requests, version.errors, figures.dropped) == (3, 0, 0)


async def test_http_has_the_weights_and_rules_of_grpc() -> None:
    async with with_triton("t0", "t1") as (g, rollout, addresses):
        arms = [arm("1.0.0", addresses[0], weight=50), arm("1.1.0", addresses[1], weight=50, role=CANDIDATE)]
        made = route(*arms)
        made.rules.add(when="request.headers['x-user-type'] == 'premium'", to=CANDIDATE)
        await rollout.in_force(rollout.set(made))
        await http_ready(g)
        call = g.public_channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", request_serializer=lambda m: m.SerializeToString()
        )
        url = f"http://{g.public}/v2/models/{MODEL}/infer"
        sides = set()
        for n in range(40):
            status, headers, _ = await asyncio.to_thread(http_call, url, json_body(), x_user=f"u{n}")
            assert status == 200
            pending = call(infer_request(), metadata=[("x-millrace-model", MODEL), ("x-user", f"u{n}")], timeout=5)
            await pending
            version = dict(await pending.initial_metadata())["x-millrace-version"]
            assert headers["x-millrace-version"] == version, "one caller, two versions"
            assert headers["x-millrace-prediction-id"]
            sides.add(version)
        assert sides == {"1.0.0", "1.1.0"}
        for n in range(10):
            answer = await asyncio.to_thread(http_call, url, json_body(), x_user=f"u{n}", x_user_type="premium")
            assert answer[1]["x-millrace-version"] == "1.1.0"
        # A version in the path is one the caller chose, and no evidence.
        chosen = f"http://{g.public}/v2/models/{MODEL}/versions/1.1.0"
        assert (await asyncio.to_thread(http_call, f"{chosen}/infer", json_body()))[0] == 403
        made.testers.append("*")
        await rollout.in_force(rollout.set(made))
        for _ in range(3):
            answer = await asyncio.to_thread(http_call, f"{chosen}/infer", json_body())
            assert (answer[0], answer[1]["x-millrace-version"]) == (200, "1.1.0")
        assert (await asyncio.to_thread(http_call, f"{chosen}/ready"))[0] == 200
        unknown = f"http://{g.public}/v2/models/{MODEL}/versions/9.9.9/infer"
        assert (await asyncio.to_thread(http_call, unknown, json_body()))[0] == 404
        # What the model refuses is its caller's fault, and counted as no error.
        wrong = json.dumps({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}]}).encode()
        status, _, body = await asyncio.to_thread(http_call, url, wrong)
        assert (status, "error" in json.loads(body)) == (400, True)

        async def counted() -> bool:
            figures = await g.figures()
            return sum(v.requests for v in figures.versions) == 91 and not any(v.errors for v in figures.versions)

        await eventually(counted, "every call in the figures, none an error")


async def test_calls_by_http_are_replayed_and_compared_like_others() -> None:
    async with with_triton("t0", "t1") as (g, rollout, addresses):
        shadow = arm("1.1.0", addresses[1], weight=0.0, role=CANDIDATE)
        shadow.mirror_percent = 100.0
        await rollout.in_force(rollout.set(route(arm("1.0.0", addresses[0]), shadow)))
        await http_ready(g)

        def calls() -> None:
            import tritonclient.http as http_client

            client = http_client.InferenceServerClient(g.public)
            for number in range(30):
                tensor = http_client.InferInput("features", [2, WIDTH], "FP32")
                values = np.array([[number, 2, 3], [4, 5, 6]], np.float32)
                tensor.set_data_from_numpy(values, binary_data=number % 2 == 0)
                packed = "gzip" if number % 3 == 0 else None
                client.infer(
                    MODEL, [tensor], response_compression_algorithm=packed, request_compression_algorithm=packed
                )
            client.close()

        await asyncio.to_thread(calls)

        async def compared() -> bool:
            found = next((v for v in (await g.figures()).versions if v.version == "1.1.0"), None)
            return found is not None and bool(found.shadow) and found.shadow[0].pairs == 60

        await eventually(compared, f"30 pairs of two rows\n{g.logs()}")
        (version,) = [v for v in (await g.figures()).versions if v.version == "1.1.0"]
        assert (version.shadow[0].label_flips, version.shadow[0].shift_sum) == (0, 0)
        request = prediction_pb2.GetRequestSamplesRequest(model=MODEL, limit=1)
        (sample,) = (await g.figures_stub.GetRequestSamples(request, timeout=5)).requests
        # Replayed as it is to a server, as the warm gate does.
        async with grpc.aio.insecure_channel(addresses[1]) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            answer = service_pb2.ModelInferResponse.FromString(await call(sample, timeout=5))
        assert answer.outputs[0].shape == [2, 1]


async def test_rest_and_openapi_and_grpc_web() -> None:
    async with with_triton("t0") as (g, rollout, (address,)):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        base = f"http://{g.public}"
        values = {"a": {"double_value": 1.0}, "b": {"int64_value": "2"}, "c": {"double_value": 3.0}}
        body = json.dumps({"inputs": values, "subject": "s"}).encode()

        async def predicted():
            found = await asyncio.to_thread(
                http_call, f"{base}/v1/models/{MODEL}:predict", body, content_type="application/json"
            )
            return found if found[0] != 503 else None

        status, _, content = await eventually(predicted, "Predict by REST")
        assert status == 200, content
        answer = json.loads(content)
        assert (answer["model"], answer["version"], answer["missing_features"]) == (MODEL, "1.0.0", [])
        assert 0 < answer["outputs"][0] < 1
        wrong = await asyncio.to_thread(
            http_call, f"{base}/v1/models/{MODEL}:predict", b'{"inputs": {}}', content_type="application/json"
        )
        assert (wrong[0], "join key is missing" in json.loads(wrong[2])["message"]) == (400, True)
        missing = await asyncio.to_thread(http_call, f"{base}/v1/nothing", b"{}", content_type="application/json")
        assert missing[0] == 404

        status, headers, content = await asyncio.to_thread(http_call, f"{base}/openapi.json")
        page = json.loads(content)
        assert (status, headers["content-type"]) == (200, "application/json")
        assert {"/v2/models/{model}/infer", "/v1/models/{model}:predict"} <= page["paths"].keys()
        assert "sticky_key" in page["components"]["schemas"]["PredictRequest"]["properties"]

        message = infer_request().SerializeToString()
        framed = b"\0" + struct.pack(">I", len(message)) + message
        url = f"{base}/inference.GRPCInferenceService/ModelInfer"
        kind = "application/grpc-web-text"
        status, headers, content = await asyncio.to_thread(
            http_call, url, base64.b64encode(framed), content_type=kind, accept=kind, x_millrace_model=MODEL
        )
        assert (status, headers["content-type"].split("+")[0]) == (200, kind)
        raw = base64.b64decode(content.replace(b"=", b"") + b"=" * (-len(content.replace(b"=", b"")) % 4))
        size = struct.unpack_from(">I", raw, 1)[0]
        assert service_pb2.ModelInferResponse.FromString(raw[5 : 5 + size]).outputs[0].name == "probability"
