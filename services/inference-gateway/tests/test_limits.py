"""Who has to wait when there is too much: limits of each client, and calls of low priority, by the real Envoy."""

import asyncio
from collections import Counter
from pathlib import Path

import grpc
import models
from gateway import arm, eventually, gateway, route
from test_auth import code, line

OK, EXHAUSTED, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE


async def test_each_client_has_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("".join(line(name, f"{name}-key") for name in ("shop", "batch", "big")))
    limits = {"each_client": {"calls_per_s": 1, "burst": 5}, "clients": {"big": {"calls_per_s": 10_000}}}
    async with (
        gateway(auth={"api_keys_file": str(file)} | limits) as (g, rollout),
        models.serving(models.Model("1.0.0")) as address,
    ):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))

        async def calls(name: str, count: int) -> Counter:
            return Counter([await code(g, x_api_key=f"{name}-key") for _ in range(count)])

        greedy = await calls("batch", 40)
        assert greedy.keys() == {OK, EXHAUSTED}
        assert 5 <= greedy[OK] <= 30
        # What one used up is not taken from the others.
        assert (await calls("shop", 4))[OK] == 4
        assert await calls("big", 60) == {OK: 60}

        async def again() -> bool:
            return await code(g, x_api_key="batch-key") is OK

        await eventually(again, "calls of the greedy client again")


async def test_low_priority_goes_first() -> None:
    limits = {"max_requests": 20, "max_pending_requests": 20, "low_priority_percent": 10.0, "max_retries": 0}
    async with gateway(envoy=limits) as (g, rollout), models.serving(models.Model("1.0.0", delay_s=0.5)) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address), timeout_ms=20_000)))
        low = [asyncio.create_task(code(g, x_millrace_priority="low")) for _ in range(15)]
        normal = [asyncio.create_task(code(g)) for _ in range(15)]
        shed, served = Counter(await asyncio.gather(*low)), Counter(await asyncio.gather(*normal))
        assert served == {OK: 15}
        assert shed.keys() == {OK, UNAVAILABLE}
        assert 2 <= shed[OK] <= 4
        assert await code(g, x_millrace_priority="low") is OK
