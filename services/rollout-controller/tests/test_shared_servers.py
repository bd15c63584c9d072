"""Two versions inside one real Triton: loaded beside, rolled back, refused for want of memory; stable notices nothing."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc.aio as tritonclient
from millrace_rollout_controller import memory, server_versions
from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.local_executor import LocalExecutor
from millrace_rollout_controller.plans import ArmSeen
from millrace_rollout_controller.server_block import Server
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from .support import Files, onnx_model, until, version_ref
from .test_executor import executor

WEIGHTS = {"1.0.0": 0.1, "1.1.0": 0.2, "1.2.0": 0.3}
CONTENTS = {version: onnx_model(weight) for version, weight in WEIGHTS.items()}
SHARED = Server.model_validate({"placement": "Shared"})


def wanted(*versions: str, server: Server = SHARED, replicas: int = 1) -> list[Wanted]:
    return [Wanted("flights", version_ref(version, CONTENTS[version]), replicas, server) for version in versions]


async def seen(
    made: LocalExecutor, want: list[Wanted], ready: set[str], in_use: frozenset[str] | None = frozenset()
) -> dict[str, ArmSeen]:
    """Wait until exactly those versions are ready, and no other is in a server."""

    async def look() -> dict[str, ArmSeen] | None:
        await made.converge(want, in_use)
        found = {version: arm for (_, version), arm in made.seen().items()}
        return found if {version for version, arm in found.items() if arm.ready} == ready else None

    found = await until(look, what=f"{ready} ready: {made.seen()}")
    assert isinstance(found, dict)
    return found


async def answer(client: tritonclient.InferenceServerClient, version: str) -> float:
    tensor = tritonclient.InferInput("features", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 4), np.float32))
    number = server_versions.number(version)
    found = await client.infer("flight-delay", [tensor], model_version=number, client_timeout=10)
    return float(found.as_numpy("probability")[0, 0])


def right(version: str) -> float:
    return float(1 / (1 + np.exp(-4 * WEIGHTS[version])))


@dataclass
class Callers:
    """Calls of stable all the while."""

    answers: int = 0
    problems: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def calling(endpoint: str, version: str) -> AsyncIterator[Callers]:
    callers = Callers()

    async def call() -> None:
        async with tritonclient.InferenceServerClient(endpoint) as client:
            while True:
                try:
                    found = await answer(client, version)
                except InferenceServerException as error:
                    callers.problems.append(str(error))
                    continue
                if abs(found - right(version)) > 1e-5:
                    callers.problems.append(f"answered {found}")
                callers.answers += 1
                await asyncio.sleep(0.002)

    tasks = [asyncio.create_task(call()) for _ in range(3)]
    try:
        yield callers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def stubs(made: LocalExecutor) -> set[int]:
    """Processes of the models inside the servers."""
    pids = [replica.record.pid for replica in made._replicas.values()]
    return {child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)}


async def test_a_candidate_comes_and_goes_beside_stable(tmp_path: Path) -> None:
    files = Files()
    for content in CONTENTS.values():
        files.add(content)
    async with executor(tmp_path, files) as made:
        found = await seen(made, wanted("1.0.0"), {"1.0.0"})
        (endpoint,) = found["1.0.0"].ready
        before = stubs(made)
        assert len(before) == 1
        async with calling(endpoint, "1.0.0") as callers:
            found = await seen(made, wanted("1.0.0", "1.1.0"), {"1.0.0", "1.1.0"})
            assert found["1.1.0"].ready == (endpoint,), "no second server"
            assert before < stubs(made), "stable's model is the process it was"
            async with tritonclient.InferenceServerClient(endpoint) as client:
                assert await answer(client, "1.1.0") == pytest.approx(right("1.1.0"))
                statistics = await client.get_inference_statistics("flight-delay")
            counted = {one.version: one.inference_count for one in statistics.model_stats}
            assert counted.keys() == {server_versions.number(version) for version in ("1.0.0", "1.1.0")}

            # Back: while a gateway may still send to it there it stays, and then its memory goes.
            place = frozenset({endpoint, f"{endpoint}/flight-delay/1.1.0"})
            await seen(made, wanted("1.0.0"), {"1.0.0", "1.1.0"}, in_use=place)
            await seen(made, wanted("1.0.0"), {"1.0.0", "1.1.0"}, in_use=None)
            found = await seen(
                made, wanted("1.0.0"), {"1.0.0"}, in_use=frozenset({endpoint, f"{endpoint}/flight-delay/1.0.0"})
            )
            await until(lambda: stubs(made) == before, what="the candidate's process is gone")

            # What cannot be loaded is said, is not left behind and disturbs nobody.
            files.contents[next(iter(version_ref("1.2.0", CONTENTS["1.2.0"]).artifacts)).sha256] = b"other bytes"

            async def refused() -> bool:
                await made.converge(wanted("1.0.0", "1.2.0"), frozenset())
                arm = made.seen().get(("flights", "1.2.0"))
                return arm is not None and arm.refusal is not None and arm.refusal.permanent

            await until(refused, what="other bytes than the version's are refused")
            arm = made.seen()["flights", "1.2.0"]
            assert arm.refusal is not None
            assert arm.refusal.reason == "DataLoss"
            assert stubs(made) == before

            # No room: it waits, and is loaded as soon as there is.
            large = Server.model_validate({"placement": "Shared", "memoryMib": 4_000_000})
            short = [wanted("1.0.0")[0], *wanted("1.1.0", server=large)]

            async def held_back() -> bool:
                await made.converge(short, frozenset())
                arm = made.seen().get(("flights", "1.1.0"))
                return arm is not None and arm.refusal is not None

            await until(held_back, what="no room for the candidate")
            arm = made.seen()["flights", "1.1.0"]
            assert arm.refusal is not None
            assert (arm.refusal.reason, arm.refusal.permanent) == ("InsufficientMemory", False)
            assert "needs 4000000 MiB beside what the server holds" in arm.refusal.message
            await seen(made, wanted("1.0.0", "1.1.0"), {"1.0.0", "1.1.0"})
        assert callers.problems == []
        assert callers.answers > 100

        # A server that crashes gets both again, on its port.
        (replica,) = made._replicas.values()
        os.kill(replica.record.pid, signal.SIGKILL)
        await until(lambda: not replica.ready, what="the crash is seen")
        found = await seen(made, wanted("1.0.0", "1.1.0"), {"1.0.0", "1.1.0"})
        assert found["1.0.0"].ready == found["1.1.0"].ready == (endpoint,)
    assert not list(tmp_path.glob("servers/*.json"))


async def test_adopted_servers_keep_what_they_hold(tmp_path: Path) -> None:
    files = Files()
    for content in CONTENTS.values():
        files.add(content)
    async with executor(tmp_path, files, stop=False) as first:
        found = await seen(first, wanted("1.0.0", "1.1.0"), {"1.0.0", "1.1.0"})
        before = stubs(first)
    async with executor(tmp_path, files) as second:
        assert await seen(second, wanted("1.0.0", "1.1.0"), {"1.0.0", "1.1.0"}) == found
        assert (stubs(second), files.fetched) == (before, 2)


def test_free_memory_is_the_least_of_what_is_left() -> None:
    pid = os.getpid()
    used = memory.used_bytes(pid)
    assert used > 10 * memory.MIB
    machine = memory.free_bytes(pid, None)
    assert 0 < machine <= psutil.virtual_memory().total
    limited = memory.free_bytes(pid, str(used + 50 * memory.MIB))
    assert 0 < limited < 100 * memory.MIB
    assert memory.free_bytes(pid, "1Mi") == 0
    amounts = {"512Mi": 512 * memory.MIB, "1.5Gi": 1536 * memory.MIB, "2G": 2 * 10**9, "700": 700}
    assert {text: memory.quantity_bytes(text) for text in amounts} == amounts
    ref = version_ref("1.0.0", CONTENTS["1.0.0"])
    size = ref.artifacts[0].size_bytes
    assert memory.needed_bytes(ref, SHARED, factor=2, base_mib=64) == 64 * memory.MIB + 2 * size
    declared = Server.model_validate({"placement": "Shared", "memoryMib": 900})
    assert memory.needed_bytes(ref, declared, factor=2, base_mib=64) == 900 * memory.MIB


def test_numbers_of_versions() -> None:
    numbers = {version: server_versions.number(version) for version in ("1.4.0", "0.0.1", "999999.0.999999")}
    assert numbers == {"1.4.0": "1000004000000", "0.0.1": "1", "999999.0.999999": "999999000000999999"}
    others = [server_versions.number(version) for version in ("0.0.0", "1.4.0-rc.1", "1.4.0+b1", "1000000.0.0")]
    assert len(set(others)) == 4
    assert all(8 * 10**18 <= int(found) < 2**63 for found in others)
    logged = service_pb2.ModelInferRequest(model_name="flight-delay", model_version="7", id="a")
    named = service_pb2.ModelInferRequest.FromString(logged.SerializeToString() + server_versions.naming("1.4.0"))
    assert (named.model_name, named.model_version, named.id) == ("flight-delay", "1000004000000", "a")
