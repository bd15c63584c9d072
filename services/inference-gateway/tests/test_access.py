"""Who may call which model, and who may choose its version, by the real Envoy."""

import asyncio
import math
import re
import urllib.request
from pathlib import Path

import grpc.aio
import models
import pytest
from gateway import CANDIDATE, MODEL, arm, eventually, gateway, route
from load import infer
from millrace_api.common.v1 import common_pb2
from millrace_api.events.v1 import events_pb2
from millrace_api.prediction.v1 import prediction_pb2
from millrace_inference_gateway import client_refusals as refusals_by_client
from millrace_kit.bus import PREDICTIONS, open_bus
from parts.server import free_port
from prometheus_client import REGISTRY
from test_auth import code, line

OK, DENIED, MISSING = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


async def test_a_chosen_version_is_no_evidence() -> None:
    async with (
        gateway() as (g, rollout),
        models.serving(models.Model("1.0.0")) as one,
        models.serving(models.Model("1.1.0")) as two,
    ):
        arms = [arm("1.0.0", one), arm("1.1.0", two, weight=0, role=CANDIDATE)]
        await rollout.in_force(rollout.set(route(*arms, testers=["*"])))
        for _ in range(5):
            assert await infer(g.public_channel, x_millrace_model=MODEL, x_millrace_version="1.1.0") == "1.1.0"
        # The name of the model may come from the message.
        assert await infer(g.public_channel, x_millrace_version="1.1.0") == "1.1.0"
        assert await code(g, x_millrace_version="2.0.0") is MISSING
        assert await infer(g.public_channel, x_millrace_model=MODEL) == "1.0.0"

        async def logged() -> bool:
            return (await g.figures()).logged >= 7

        await eventually(logged, "seven predictions on the bus")
        figures = await g.figures()
        assert [(v.version, v.requests) for v in figures.versions] == [("1.0.0", 1)]
        assert figures.dropped == 0
        bus = await open_bus(g.settings.bus)
        subscription = await bus.subscribe([PREDICTIONS], group="test")
        batches = [events_pb2.PredictionsMade.FromString(m.value) for m in await subscription.fetch()]
        found = [(p.version, p.pinned) for batch in batches for p in batch.predictions]
        assert sorted(found) == [("1.0.0", False), *[("1.1.0", True)] * 6]
        await subscription.close()
        await bus.close()
        # Without testers nobody may.
        await rollout.in_force(rollout.set(route(*arms)))
        assert await code(g, x_millrace_version="1.1.0") is DENIED


async def predict_code(g, **metadata: str) -> grpc.StatusCode:
    request = prediction_pb2.PredictRequest(model=MODEL, inputs={"a": common_pb2.Value(double_value=1.0)})
    named = [(key.replace("_", "-"), value) for key, value in metadata.items()]
    try:
        await g.predictions.Predict(request, metadata=named, timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return OK


def client_refusals(port: int) -> dict[tuple[str, str], float]:
    """By caller and reason."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.findall(r'millrace_gateway_client_refused_total\{client="(.*)",reason="(.*)"\} (.*)', text)
    return {(client, reason): float(count) for client, reason, count in found}


def test_names_of_callers_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals_by_client, "_names", {f"c{n}" for n in range(refusals_by_client.MAX_CLIENTS - 1)})
    for name in ("last", "more", "still more", "last"):
        refusals_by_client.count_client(name, "token")

    def count(name: str) -> float:
        labels = {"client": name, "reason": "token"}
        return REGISTRY.get_sample_value("millrace_gateway_client_refused_total", labels) or 0.0

    assert (count("last"), count(refusals_by_client.OTHERS), count("more")) == (2, 2, 0)


async def test_callers_and_testers(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("".join(line(name, f"{name}-key") for name in ("shop", "qa", "other")))
    port = free_port()
    async with (
        gateway(auth={"api_keys_file": str(file)}, telemetry={"metrics_listen": f"127.0.0.1:{port}"}) as (g, rollout),
        models.serving(models.Model("1.0.0")) as one,
        models.serving(models.Model("1.1.0")) as two,
    ):
        arms = [arm("1.0.0", one), arm("1.1.0", two, weight=0, role=CANDIDATE)]
        made = route(*arms, callers=["shop", "qa"], testers=["qa"])
        made.rules.add(when="request.headers['x-millrace-client'] == 'nobody'", to=CANDIDATE)
        await rollout.in_force(rollout.set(made))
        assert await code(g, x_api_key="shop-key") is OK
        assert await code(g, x_api_key="other-key") is DENIED
        # Nobody takes another's name.
        assert await code(g, x_api_key="other-key", x_millrace_client="shop") is DENIED
        assert await code(g, x_api_key="qa-key", x_millrace_version="1.1.0") is OK
        assert await code(g, x_api_key="shop-key", x_millrace_version="1.1.0") is DENIED
        # The name that is read from the message does not open another way.
        try:
            await infer(g.public_channel, x_api_key="other-key")
        except grpc.aio.AioRpcError as error:
            assert error.code() is DENIED  # noqa: PT017 - either way is checked
        else:
            raise AssertionError
        # Nor does Predict.
        assert await predict_code(g, x_api_key="shop-key") is OK
        assert await predict_code(g, x_api_key="other-key") is DENIED
        assert await predict_code(g, x_api_key="other-key", x_millrace_client="shop") is DENIED
        assert await predict_code(g, x_api_key="shop-key", x_millrace_version="1.1.0") is DENIED
        # Who was refused what is counted by name.
        wrong = common_pb2.Value(double_value=math.nan)
        with pytest.raises(grpc.aio.AioRpcError, match="NaN"):
            await g.predictions.Predict(
                prediction_pb2.PredictRequest(model=MODEL, inputs={"a": wrong}), metadata=[("x-api-key", "shop-key")]
            )
        assert await code(g, x_api_key="nobody's") is UNAUTHENTICATED

        async def counted() -> bool:
            found = await asyncio.to_thread(client_refusals, port)
            return found == {
                ("other", "not_permitted"): 5,
                ("shop", "not_permitted"): 2,
                ("shop", "invalid"): 1,
                ("", "api_key"): 1,
            }

        await eventually(counted, "refusals by caller and reason")
        # Rules know the caller.
        by_name = route(*arms)
        by_name.rules.add(when="request.headers['x-millrace-client'] == 'qa'", to=CANDIDATE)
        await rollout.in_force(rollout.set(by_name))
        assert await infer(g.public_channel, x_millrace_model=MODEL, x_api_key="qa-key") == "1.1.0"
        assert await infer(g.public_channel, x_millrace_model=MODEL, x_api_key="other-key") == "1.0.0"

        async def named() -> bool:
            return (await g.figures()).logged >= 3

        await eventually(named, "predictions on the bus")
        bus = await open_bus(g.settings.bus)
        subscription = await bus.subscribe([PREDICTIONS], group="test")

        async def clients() -> bool:
            for message in await subscription.fetch(timeout_s=0.2):
                seen.update(p.client for p in events_pb2.PredictionsMade.FromString(message.value).predictions)
            return seen == {"shop", "qa", "other"}

        seen: set[str] = set()
        await eventually(clients, "every answered caller by name in the prediction log")
        await subscription.close()
        await bus.close()
        await asyncio.sleep(0)
