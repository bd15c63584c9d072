"""Several gateways, each a real Envoy and a Python process: one weight, and an end that fails no call."""

import asyncio
import contextlib
import math
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import models
from gateway import CANDIDATE, MODEL, Features, Gateway, Rollout, arm, eventually, free_ports, peers, route
from load import infer, infer_request, load
from millrace_api.common.v1 import common_pb2
from millrace_api.prediction.v1 import prediction_pb2, prediction_pb2_grpc

CLUSTER = {"drain_s": 10.0, "envoy": {"deregister_s": 1.0}}


@contextlib.asynccontextmanager
async def gateways(count: int, **changes: object) -> AsyncIterator[tuple[list[Gateway], Rollout]]:
    """Gateways of one controller."""
    rollout, ports = Rollout(), free_ports(2)
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for number in range(count):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gw-")))
            made.append(
                Gateway(
                    folder,
                    gateway_id=f"gateway-{number}",
                    advertise_address=f"10.0.0.{number}:7405",
                    rollout_address=f"127.0.0.1:{ports[0]}",
                    feature_address=f"127.0.0.1:{ports[1]}",
                    **changes,
                )
            )
        try:
            async with peers(rollout, Features(), ports):
                for each in made:
                    each.start_envoy()
                    each.start_python()
                yield made, rollout
        except BaseException:
            for each in made:
                print(each.logs())
            raise
        finally:
            for each in made:
                await each.close()


async def test_all_replicas_hold_one_weight_within_a_second() -> None:
    calls = 400
    async with (
        gateways(3) as (made, rollout),
        models.serving(models.Model("1.0.0")) as old,
        models.serving(models.Model("1.1.0")) as new,
    ):
        await rollout.in_force(rollout.set(route(arm("1.0.0", old))), 40)
        await eventually(lambda: asyncio.sleep(0, len(rollout.acknowledged) == 3), "all gateways", 40)
        assert rollout.seen == {f"gateway-{n}": f"10.0.0.{n}:7405" for n in range(3)}
        apart: list[float] = []
        for weight in (10, 30, 60):
            arms = arm("1.0.0", old, weight=100 - weight), arm("1.1.0", new, weight=weight, role=CANDIDATE)
            sent = time.monotonic()
            generation = rollout.set(route(*arms))

            async def all_have(generation: int = generation) -> bool:
                return all(seen[0] >= generation for seen in rollout.acknowledged.values())

            await eventually(all_have, "every gateway's acknowledgement")
            apart.append(max(at for _generation, at in rollout.acknowledged.values()) - sent)
            users = [f"user-{n}" for n in range(calls)]
            shares = []
            for each in made:
                found: set[str] = set()
                for start in range(0, calls, 40):
                    some = users[start : start + 40]
                    versions = await asyncio.gather(
                        *(infer(each.public_channel, x_millrace_model=MODEL, x_user=user) for user in some)
                    )
                    found |= {user for user, version in zip(some, versions, strict=True) if version == "1.1.0"}
                shares.append(found)
            # Not only the same share: the same callers.
            assert shares[0] == shares[1] == shares[2]
            bound = 4 * math.sqrt(weight / 100 * (1 - weight / 100) / calls)
            assert abs(len(shares[0]) / calls - weight / 100) <= bound
        print(f"all three acknowledged after at most {max(apart) * 1000:.0f} ms")
        assert max(apart) < 1.0


async def test_ending_a_gateway_fails_no_call() -> None:
    async with (
        gateways(2, **CLUSTER) as (made, rollout),
        models.serving(models.Model("1.0.0", delay_s=0.02)) as address,
    ):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))), 40)
        await asyncio.gather(*(each.generation(1) for each in made))
        async with both(made) as channel:
            first = made[0]
            assert first.envoy is not None
            assert first.python is not None
            predictions = prediction_pb2_grpc.PredictionServiceStub(channel)
            failed: list[grpc.aio.AioRpcError] = []

            async def predict() -> None:
                inputs = {"a": common_pb2.Value(double_value=1.0)}
                while True:
                    try:
                        await predictions.Predict(prediction_pb2.PredictRequest(model=MODEL, inputs=inputs), timeout=10)
                    except grpc.aio.AioRpcError as error:
                        failed.append(error)

            predicting = [asyncio.create_task(predict()) for _ in range(2)]
            async with load(Both(channel), 6) as counts:
                await counts.grow(200)
                # As a kubelet ends a pod: both processes at once.
                first.envoy.send_signal(signal.SIGTERM)
                first.python.send_signal(signal.SIGTERM)
                started = time.monotonic()
                await asyncio.to_thread(first.envoy.wait, 20)
                ended = time.monotonic()
                await counts.grow(200)
                assert await asyncio.to_thread(first.python.wait, 20) == 0
                after = time.monotonic()
                await counts.grow(100)
            for task in predicting:
                task.cancel()
            await asyncio.gather(*predicting, return_exceptions=True)
            print(
                f"Envoy ended after {ended - started:.1f} s, Python after {after - started:.1f} s, {counts.done} calls"
            )
            assert counts.errors == []
            assert failed == []
            assert first.envoy.returncode == 0
            assert 1.0 <= ended - started < 10
            # The prediction log has everything: what Envoy counted as answered was reported before the end.
            assert "worker" not in first.logs()


class Both:
    """What `load` needs of a gateway, over a channel to several."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.public_channel = channel


@contextlib.asynccontextmanager
async def both(made: list[Gateway]) -> AsyncIterator[grpc.aio.Channel]:
    """A client that goes round over all gateways, as over the addresses of a headless Service.

    It has no retry policy. What gRPC does by itself stays on: a call that meets a connection's GOAWAY before the server saw it is sent
    once more (gRFC A6, transparent retries); with `grpc.enable_retries` 0 the client would lose that race on its own side.
    """
    target = "ipv4:" + ",".join(each.public for each in made)
    options = [("grpc.service_config", '{"loadBalancingConfig":[{"round_robin":{}}]}')]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        await channel.channel_ready()
        yield channel


async def test_a_running_call_ends_in_peace_and_a_second_signal_waits_for_nothing() -> None:
    async with gateways(1, **CLUSTER) as (made, rollout), models.serving(models.Model("1.0.0", delay_s=4.0)) as address:
        (g,) = made
        await rollout.in_force(rollout.set(route(arm("1.0.0", address), timeout_ms=20_000)), 40)
        call = asyncio.create_task(infer(g.public_channel, x_millrace_model=MODEL, timeout_s=20))
        await eventually(lambda: asyncio.to_thread(running_calls, g), "a running call")
        assert g.envoy is not None
        g.envoy.send_signal(signal.SIGTERM)
        assert await call == "1.0.0"
        await asyncio.to_thread(g.envoy.wait, 10)

        g.start_envoy()
        await eventually(lambda: asyncio.to_thread(ready, g), "Envoy again")
        call = asyncio.create_task(infer(g.public_channel, x_millrace_model=MODEL, timeout_s=20))
        await eventually(lambda: asyncio.to_thread(running_calls, g), "a running call")
        began = time.monotonic()
        g.envoy.send_signal(signal.SIGTERM)
        await eventually(lambda: asyncio.to_thread(lambda: not ready(g)), "draining")
        g.envoy.send_signal(signal.SIGTERM)
        await asyncio.to_thread(g.envoy.wait, 10)
        assert time.monotonic() - began < 4
        await asyncio.gather(call, return_exceptions=True)


def page(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    try:
        request = urllib.request.Request(f"http://{address}{path}", method=method)
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def ready(g: Gateway) -> bool:
    return page(g.settings.envoy_admin_listen, "/ready")[0] == 200


def running_calls(g: Gateway) -> bool:
    return page(g.settings.envoy_admin_listen, "/stats?filter=http.v2.downstream_rq_active")[1].strip().endswith(": 1")


async def test_probes_and_metrics() -> None:
    stats, metrics = free_ports(2)
    changes = CLUSTER | {
        "stats_listen": f"127.0.0.1:{stats}", "telemetry": {"metrics_listen": f"127.0.0.1:{metrics}"}
    }  # fmt: skip
    async with gateways(1, **changes) as (made, rollout), models.serving(models.Model("1.0.0")) as address:
        (g,) = made
        at, own = f"127.0.0.1:{stats}", f"127.0.0.1:{metrics}"

        async def ask(where: str, path: str, status: int) -> str:
            async def asked() -> str | None:
                found, text = await asyncio.to_thread(page, where, path)
                return (text or "-") if found == status else None

            return await eventually(asked, f"{status} from {path}")

        # The controller is there and has no routes: ready, for there is nothing to wait for.
        await ask(at, "/ready", 200)
        await ask(own, "/readyz", 200)
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        await infer(g.public_channel, x_millrace_model=MODEL)
        assert "envoy_http_downstream_rq_total" in await ask(at, "/stats/prometheus", 200)
        for path, method in (
            ("/", "GET"), ("/stats", "GET"), ("/config_dump", "GET"), ("/quitquitquit", "POST"), ("/ready", "POST"),
            ("/stats/prometheus/../../quitquitquit", "POST"), ("/ready/../config_dump", "GET"),
        ):  # fmt: skip
            status, _text = await asyncio.to_thread(page, at, path, method)
            assert status in {404, 400}, path
        text = await ask(own, "/metrics", 200)
        for line in (
            'millrace_gateway_endpoints{model="flight-delay",role="stable",version="1.0.0"} 1.0',
            'millrace_gateway_weight_percent{model="flight-delay",role="stable",version="1.0.0"} 100.0',
            "millrace_gateway_routes_generation 1.0",
            "millrace_gateway_predictions_dropped_total 0.0",
        ):
            assert line in text
        assert g.envoy is not None
        assert g.python is not None
        g.envoy.send_signal(signal.SIGTERM)
        g.python.send_signal(signal.SIGTERM)
        await asyncio.gather(ask(at, "/ready", 503), ask(at, "/livez", 200), ask(own, "/readyz", 503))
        # Calls that come all the same are answered.
        assert await infer(g.public_channel, x_millrace_model=MODEL) == "1.0.0"
        await asyncio.to_thread(g.envoy.wait, 15)


async def test_ready_only_with_the_routes_of_now() -> None:
    metrics = free_ports(1)[0]
    own = f"127.0.0.1:{metrics}"
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        changes = {"telemetry": {"metrics_listen": own}}
        g, rollout = Gateway(Path(folder), **changes), Rollout()

        async def is_ready() -> bool:
            return (await asyncio.to_thread(page, own, "/readyz"))[0] == 200

        async def starting() -> bool:
            return (await asyncio.to_thread(page, own, "/readyz"))[0] == 503

        try:
            # New, and the controller is away: no routes, not ready, for as long as it takes.
            g.start_python()
            g.start_envoy()
            await g.generation(0)
            assert await starting()
            async with models.serving(models.Model("1.0.0")) as address:
                generation = rollout.set(route(arm("1.0.0", address)))
                async with peers(rollout, Features(), g.peer_ports):
                    await rollout.in_force(generation)
                    await eventually(is_ready, "ready with routes", 60)
                # Once ready, the controller is not needed.
                assert await is_ready()
                # Back after a while, with Envoy away: the routes of then are known and those of now cannot be in force.
                g.kill_python()
                g.kill_envoy()
                generation = rollout.set(route(arm("1.0.1", address)))
                async with peers(rollout, Features(), g.peer_ports):
                    g.start_python()
                    await eventually(starting, "a start", 60)
                    g.start_envoy()
                    await eventually(is_ready, "ready with the new routes", 60)
                    assert (await g.figures()).routes_generation == generation
                # Back while the controller is away: after a moment the last routes have to do.
                g.kill_python()
                g.start_python()
                await eventually(is_ready, "ready without the controller", 60)
        except BaseException:
            print(g.logs())
            raise
        finally:
            await g.close()


async def test_connections_grow_old_and_streams_live_on() -> None:
    async with (
        gateways(1, envoy={"connection_age_s": 0.5, "goaway_s": 0.2}) as (made, rollout),
        models.serving(models.Model("1.0.0", delay_s=0.01)) as address,
    ):
        (g,) = made
        await rollout.in_force(rollout.set(route(arm("1.0.0", address), timeout_ms=20_000)), 40)
        async with load(g) as counts:
            await counts.grow(50)
            started = await asyncio.to_thread(connections, g)

            stream = g.public_channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(
                metadata=[("x-millrace-model", MODEL)], timeout=30
            )
            await stream.write(infer_request().SerializeToString())
            assert await stream.read()

            async def renewed() -> bool:
                return await asyncio.to_thread(connections, g) >= started + 5

            await eventually(renewed, "five more connections")
            await counts.grow(50)
            # Its connection has been asked to end long ago, and stays for it.
            await stream.write(infer_request().SerializeToString())
            assert await stream.read()
            await stream.done_writing()
            assert await stream.code() is grpc.StatusCode.OK
        assert counts.errors == []


def connections(g: Gateway) -> int:
    text = page(g.settings.envoy_admin_listen, "/stats?filter=http.v2.downstream_cx_total")[1]
    return int(text.split(":")[1])


def test_the_supervisor_ends_with_its_child_and_its_child_with_it(tmp_path: Path) -> None:
    import millrace_inference_gateway

    script = Path(millrace_inference_gateway.__file__).with_name("envoy_supervisor.py")
    line = ["python3", "-I", "-S", str(script), "--admin", "127.0.0.1:1"]
    assert subprocess.run([*line, "--", "sh", "-c", "exit 3"], timeout=20, check=False).returncode == 3
    assert subprocess.run([*line, "--", "sh", "-c", "kill -9 $$"], timeout=20, check=False).returncode == 137
    mark = tmp_path / "pid"
    parent = subprocess.Popen([*line, "--", "sh", "-c", f"echo $$ > {mark}.new; mv {mark}.new {mark}; exec sleep 60"])
    deadline = time.monotonic() + 10
    while not mark.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    state = Path(f"/proc/{mark.read_text().strip()}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
