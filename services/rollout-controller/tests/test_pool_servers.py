"""Models of several deployments inside one real Triton: loaded, unloaded and loaded again, and what a new controller makes of them."""

from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc.aio as tritonclient
from millrace_rollout_controller import memory, server_versions
from millrace_rollout_controller.executor import PoolSeen, Wanted
from millrace_rollout_controller.local_executor import LocalExecutor
from millrace_rollout_controller.plans import ArmSeen
from millrace_rollout_controller.server_block import Server

from .support import Files, onnx_model, until, version_ref
from .test_executor import executor

WEIGHTS = {("ant", "1.0.0"): 0.1, ("bee", "1.0.0"): 0.2, ("bee", "1.1.0"): 0.3}
CONTENTS = {name: onnx_model(weight) for name, weight in WEIGHTS.items()}
Name = tuple[str, str]


def wanted(loaded: set[Name], *names: Name, **server: object) -> list[Wanted]:
    """Of these versions the ones that should be loaded now, the others asleep."""
    block = Server.model_validate({"pool": {"name": "small"}} | server)
    return [
        Wanted(model, version_ref(version, CONTENTS[model, version], model), int((model, version) in loaded), block)
        for model, version in names or CONTENTS
    ]


async def holds(
    made: LocalExecutor, want: list[Wanted], ready: set[Name], in_use: frozenset[str] = frozenset()
) -> dict[Name, ArmSeen]:
    """Wait until exactly those versions are in the server."""

    found: dict[Name, ArmSeen] = {}

    async def look() -> bool:
        nonlocal found
        await made.converge(want, in_use)
        found = {name: arm for name, arm in made.seen().items() if arm.servers}
        return {name for name, arm in found.items() if arm.ready} == ready == found.keys()

    await until(look, what=f"{ready} ready: {made.seen()}")
    return found


async def measured(made: LocalExecutor) -> PoolSeen:
    async def fresh() -> PoolSeen | None:
        seen = made.pools()["small"]
        return seen if seen.fresh else None

    found = await until(fresh, what="memory is measured")
    assert isinstance(found, PoolSeen)
    return found


async def answers(endpoint: str, *names: Name) -> None:
    """Each version gives its own answer, under its own model's name."""
    tensor = tritonclient.InferInput("features", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 4), np.float32))
    async with tritonclient.InferenceServerClient(endpoint) as client:
        for model, version in names:
            number = server_versions.number(version)
            found = await client.infer(model, [tensor], model_version=number, client_timeout=10)
            right = 1 / (1 + np.exp(-4 * WEIGHTS[model, version]))
            assert float(found.as_numpy("probability")[0, 0]) == pytest.approx(right, abs=1e-5)


async def test_models_of_several_deployments_come_and_go_in_one_server(tmp_path: Path) -> None:
    files = Files()
    for content in CONTENTS.values():
        files.add(content)
    ant, bee, new = CONTENTS
    async with executor(tmp_path, files) as made:
        # Nothing is wanted yet, and it is known already what each would take.
        await made.converge(wanted(set()), frozenset())
        size = 64 * memory.MIB + 2 * len(CONTENTS[ant])
        assert made.pools()["small"].sizes[ant] == size
        found = await holds(made, wanted({ant, bee}), {ant, bee})
        (endpoint,) = found[ant].ready
        assert found[bee].ready == (endpoint,), "one server"
        await answers(endpoint, ant, bee)
        seen = await measured(made)
        assert seen.free_bytes > 0
        assert 10 * memory.MIB < seen.sizes[ant] != size, "by what its load took"
        assert seen.used_bytes >= seen.sizes[ant]
        # A declaration counts where it is more than was measured.
        await made.converge(wanted({ant, bee}, memoryMib=4000), frozenset())
        assert made.pools()["small"].sizes[ant] == 4000 * memory.MIB

        # A candidate is one more version; the other deployment's model goes and comes back without the registry, and stays while gateways may
        # send calls to it: not to another model of the same number.
        await holds(made, wanted({ant, bee, new}), {ant, bee, new})
        await answers(endpoint, ant, bee, new)
        in_use = frozenset({endpoint, f"{endpoint}/ant/1.0.0", f"{endpoint}/bee/1.0.0", f"{endpoint}/bee/1.1.0"})
        await holds(made, wanted({bee, new}), {bee, new}, in_use - {f"{endpoint}/ant/1.0.0"})
        after = await measured(made)
        assert after.used_bytes < seen.used_bytes + seen.sizes[bee]
        files.down = True
        await holds(made, wanted({ant, bee}), {ant, bee})
        assert files.fetched == 3
        await answers(endpoint, ant, bee)

        # What is not there is not taken for granted, and says so.
        huge = wanted({ant, bee, new}, memoryMib=4_000_000)

        async def refused() -> bool:
            await made.converge(huge, frozenset())
            arm = made.seen().get(new)
            return arm is not None and arm.refusal is not None

        await until(refused, what="no room for the candidate")
        arm = made.seen()[new]
        assert arm.refusal is not None
        assert (arm.refusal.reason, arm.refusal.permanent) == ("InsufficientMemory", False)

        # The last deployment that names the pool takes the server with it.
        await holds(made, [], set())
        await until(lambda: not list(tmp_path.glob("pools/servers/*.json")), what="the server has ended")


async def test_a_new_controller_finds_what_was_loaded_and_unloads_what_nobody_wants(tmp_path: Path) -> None:
    files = Files()
    for content in CONTENTS.values():
        files.add(content)
    ant, bee, new = CONTENTS
    async with executor(tmp_path, files, stop=False) as first:
        found = await holds(first, wanted({ant, bee, new}), {ant, bee, new})
        sizes = (await measured(first)).sizes
        pid = next(iter(first._pools._pools.values())).replica.record.pid
        stub = len(psutil.Process(pid).children(recursive=True))
    async with executor(tmp_path, files) as second:
        # One deployment went while nobody looked, of the other the stable version alone is wanted.
        left = wanted({bee}, bee, new)
        again = await holds(second, left, {bee})
        assert again[bee].ready == found[bee].ready
        await until(
            lambda: len(psutil.Process(pid).children(recursive=True)) == stub - 2, what="the others are unloaded"
        )
        assert (await measured(second)).sizes[bee] == sizes[bee]
        await answers(again[bee].ready[0], bee)
