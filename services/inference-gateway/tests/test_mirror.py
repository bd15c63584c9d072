"""Copies to a shadow through the real Envoy: counted as the shadow's, logged as nobody's, felt by no caller."""

import asyncio

import grpc
import models
from gateway import CANDIDATE, MODEL, arm, eventually, gateway, route
from millrace_api.rollout.v1 import rollout_pb2
from millrace_inference_gateway.envoy_admin import EnvoyAdmin
from test_gateway import infer


def shadow(address: str, percent: float = 100.0) -> rollout_pb2.Arm:
    made = arm("1.1.0", address, weight=0.0, role=CANDIDATE)
    made.mirror_percent = percent
    return made


def figures_of(figures, version: str):
    return next((v for v in figures.versions if v.version == version), None)


async def counted(g, version: str, requests: int):
    async def ask():
        found = figures_of(await g.figures(), version)
        return found if found is not None and found.requests >= requests else None

    return await eventually(ask, f"{requests} requests of {version} in the figures\n{g.logs()}")


async def calls(g, count: int) -> None:
    for i in range(count):
        assert await infer(g.public_channel, x_millrace_model=MODEL, x_user=str(i)) == "1.0.0"


async def test_copies_are_counted_for_the_shadow_and_answered_by_stable() -> None:
    stable, copy = models.Model("1.0.0"), models.Model("1.1.0")
    async with gateway() as (g, rollout), models.serving(stable) as one, models.serving(copy) as two:
        await rollout.in_force(rollout.set(route(arm("1.0.0", one), shadow(two))))
        await calls(g, 50)
        answer = await g.predict("flight-1", a=1.0, c=4.0)
        assert answer.version == "1.0.0"
        found = await counted(g, "1.1.0", 51)
        assert (found.requests, found.errors, copy.calls) == (51, 0, 51)
        assert sum(bucket.count for bucket in found.latency) == 51
        assert (await counted(g, "1.0.0", 51)).requests == 51

        async def logged() -> bool:
            return (await g.figures()).logged >= 51

        await eventually(logged, "the prediction log")
        figures = await g.figures()
        assert (figures.logged, figures.dropped) == (51, 0)


async def test_a_share_of_the_requests_is_copied() -> None:
    copy = models.Model("1.1.0")
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as one, models.serving(copy) as two:
        await rollout.in_force(rollout.set(route(arm("1.0.0", one), shadow(two, 30.0))))
        await calls(g, 600)
        await counted(g, "1.0.0", 600)
        # Within five deviations of the binomial: 180 +- 5 * 11.2.
        assert 124 < copy.calls < 236
        await rollout.in_force(rollout.set(route(arm("1.0.0", one), shadow(two, 0.0))))
        before = copy.calls
        await calls(g, 50)
        assert copy.calls == before


async def test_a_failing_and_a_dead_shadow_cost_no_caller_anything() -> None:
    copy = models.Model("1.1.0")
    copy.fail = grpc.StatusCode.INTERNAL
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as one:
        async with models.serving(copy) as two:
            await rollout.in_force(rollout.set(route(arm("1.0.0", one), shadow(two))))
            await calls(g, 50)
            found = await counted(g, "1.1.0", 50)
            assert (found.requests, found.errors) == (50, 50)
        # Its server is gone now.
        await calls(g, 100)
        found = await counted(g, "1.1.0", 150)
        assert found.errors == found.requests
        # Envoy knows: there is no server to send a copy to, and the version fails all the same.
        admin = EnvoyAdmin(g.settings.envoy_admin_listen)

        async def without_shadow() -> bool:
            return {c for c, _ in await admin.healthy_servers() if c.startswith("arm/")} == {f"arm/{MODEL}/1.0.0"}

        await eventually(without_shadow, "the shadow out of the rotation")
        await calls(g, 50)
        found = await counted(g, "1.1.0", 200)
        assert (found.requests, found.errors) == (200, 200)
        stable = await counted(g, "1.0.0", 200)
        assert (stable.requests, stable.errors) == (200, 0)


async def test_a_slow_shadow_slows_nobody() -> None:
    # Far slower than a caller would wait: nobody's answer may depend on it.
    slow = models.Model("1.1.0", delay_s=20)
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as one, models.serving(slow) as two:
        await rollout.in_force(rollout.set(route(arm("1.0.0", one), shadow(two))))

        async def one_caller() -> None:
            # Each call has a deadline of 5 s.
            for _ in range(40):
                assert await infer(g.public_channel, x_millrace_model=MODEL) == "1.0.0"

        # More calls than copies may be under way at once: those above are not copied.
        await asyncio.gather(*(one_caller() for _ in range(10)))
        assert (await counted(g, "1.0.0", 400)).errors == 0
        # Copies end with the route's own deadline of 2 s, as errors of the shadow.
        found = await counted(g, "1.1.0", 1)
        assert found.errors == found.requests


async def test_a_version_without_a_role_is_meant_by_no_rule() -> None:
    async with (
        gateway() as (g, rollout),
        models.serving(models.Model("1.0.0")) as one,
        models.serving(models.Model("1.1.0")) as two,
        models.serving(models.Model("0.9.0")) as three,
    ):
        rules = [rollout_pb2.Rule(when="request.headers['x-user-type'] == 'tester'", to=rollout_pb2.ARM_ROLE_CANDIDATE)]
        kept = arm("0.9.0", three, weight=0.0, role=rollout_pb2.ARM_ROLE_UNSPECIFIED)
        preview = arm("1.1.0", two, weight=0.0, role=CANDIDATE)
        await rollout.in_force(rollout.set(route(arm("1.0.0", one), preview, kept, rules=rules)))
        assert await infer(g.public_channel, x_millrace_model=MODEL, x_user_type="tester") == "1.1.0"
        assert await infer(g.public_channel, x_millrace_model=MODEL) == "1.0.0"
        await rollout.in_force(rollout.set(route(arm("1.0.0", one), kept, rules=rules)))
        assert await infer(g.public_channel, x_millrace_model=MODEL, x_user_type="tester") == "1.0.0"
