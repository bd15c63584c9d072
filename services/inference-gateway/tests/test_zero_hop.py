"""gRPC's own xDS client follows the gateway and calls model servers itself."""

import asyncio
import json
import math
import subprocess
import sys
from pathlib import Path

import models
import pytest
from gateway import CANDIDATE, MODEL, arm, gateway, route
from load import infer

pytest.importorskip("millrace", reason="the SDK writes the bootstrap")

# In a process of its own: gRPC reads the bootstrap once, when the first xDS channel is opened.
CLIENT = """
import asyncio, json, sys
import grpc, grpc.aio
from millrace.zero_hop import sticky_metadata
from tritonclient.grpc import service_pb2, service_pb2_grpc

async def main():
    request = service_pb2.ModelInferRequest(model_name="flight-delay")
    request.inputs.add(name="features", datatype="FP32", shape=[1, 3])
    request.raw_input_contents.append(b"\\0\\0\\x80\\x3f" * 3)
    async with grpc.aio.insecure_channel("xds:///flight-delay") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def ask(key):
            metadata = [sticky_metadata(key)] if key else []
            try:
                answer = await stub.ModelInfer(request, metadata=metadata, timeout=30)
                return answer.model_version
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"

        print("ready", flush=True)
        for line in iter(sys.stdin.readline, ""):
            print(json.dumps(await asyncio.gather(*map(ask, json.loads(line)))), flush=True)

asyncio.run(main())
"""


class FollowingClient:
    """A client process that asks for some keys at once and says which version answered each."""

    def __init__(self, folder: Path, address: str) -> None:
        from millrace.zero_hop import write_bootstrap

        bootstrap = write_bootstrap(folder / "xds.json", address)
        import os

        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env={**os.environ, "GRPC_XDS_BOOTSTRAP": str(bootstrap)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def _say(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        return self._process.stdout.readline().decode()

    async def ask(self, keys: list[str]) -> list[str]:
        found: list[str] = json.loads(await asyncio.to_thread(self._say, json.dumps(keys)))
        return found

    async def ready(self) -> None:
        assert await asyncio.to_thread(self._say, "") == "ready\n"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


async def test_weights_followed_without_a_failed_call_and_the_same_callers_on_each_side(tmp_path: Path) -> None:
    async with (
        gateway(max_zero_hop_clients=2) as (g, rollout),
        models.serving(models.Model("1.0.0")) as at_first,
        models.serving(models.Model("1.1.0")) as at_second,
    ):

        def split(weight: float) -> object:
            old = arm("1.0.0", at_first, weight=100 - weight)
            # 400 calls at once take a while on a small machine.
            return route(old, arm("1.1.0", at_second, weight=weight, role=CANDIDATE), timeout_ms=20_000)

        await rollout.in_force(rollout.set(split(50)))
        client = FollowingClient(tmp_path, g.python_address)
        try:
            await client.ready()
            users = [f"user-{n}" for n in range(60)]
            assert await client.ask(users) == [
                await infer(g.public_channel, x_millrace_model=MODEL, x_user=user) for user in users
            ]
            free = await client.ask([""] * 400)
            assert set(free) == {"1.0.0", "1.1.0"}
            assert abs(free.count("1.1.0") / 400 - 0.5) <= 4 * math.sqrt(0.25 / 400)
            for change in range(50):
                await rollout.in_force(rollout.set(split((change * 37) % 101)))
                assert set(await client.ask(["", *users[:5]])) <= {"1.0.0", "1.1.0"}
            await rollout.in_force(rollout.set(split(20)))

            async def settled() -> bool:
                share = (await client.ask([""] * 400)).count("1.1.0") / 400
                return abs(share - 0.2) <= 4 * math.sqrt(0.16 / 400)

            deadline = asyncio.get_running_loop().time() + 20
            while not await settled():
                assert asyncio.get_running_loop().time() < deadline
            # Nothing of it is a figure: gates have nothing to judge, and hold.
            figures = await g.figures()
            assert figures is not None
            assert sum(version.requests for version in figures.versions) == len(users)

            # With rules or rights the model is Envoy's alone.
            await rollout.in_force(rollout.set(route(arm("1.0.0", at_first), callers=["shop"])))

            async def refused() -> bool:
                return (await client.ask([""]))[0].startswith("UNAVAILABLE")

            while not await refused():
                assert asyncio.get_running_loop().time() < deadline + 20
        finally:
            client.close()


def test_units_are_those_of_the_reference() -> None:
    from millrace.zero_hop import _xxh64, sticky_metadata

    # Published vectors of XXH64 with seed 0.
    assert _xxh64(b"") == 0xEF46DB3751D8E999
    assert _xxh64(b"a") == 0xD24EC4F1A98C6E5B
    assert _xxh64(b"abc") == 0x44BC2CF5AD770999
    assert _xxh64(b"Nobody inspects the spammish repetition") == 0xFBCEA83C8A378BF1
    name, unit = sticky_metadata("user")
    assert (name, 0 <= int(unit) < 10_000) == ("x-millrace-unit", True)
