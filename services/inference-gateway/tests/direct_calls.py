"""Calls around the gateway, as the model servers' own figures show them."""

from gateway import CANDIDATE, MODEL, Gateway, Rollout, arm, eventually, route
from millrace_rollout_controller.server_figures import ServerFigures
from test_zero_hop import FollowingClient
from tritonclient.grpc.aio import InferenceServerClient, InferInput


async def counted_once_each(
    g: Gateway, rollout: Rollout, servers: tuple[str, str], client: InferenceServerClient, row: InferInput
) -> None:
    """Of calls around the gateway the servers know and the gateway does not; of calls through it both do."""
    old, new = arm("1.0.0", servers[0], weight=50), arm("1.1.0", servers[1], weight=50, role=CANDIDATE)
    await rollout.in_force(rollout.set(route(old, new, timeout_ms=20_000)))
    figures = ServerFigures(timeout_s=10)

    async def at_servers() -> tuple[int, int]:
        found = (await figures.poll({MODEL: {"1.0.0": servers[:1], "1.1.0": servers[1:]}}))[MODEL]
        counts = [next(iter(figure.versions.values())) for figure in found.values()]
        assert len(counts) == 2
        assert not any(count.errors for count in counts)
        return counts[0].requests, counts[1].requests

    async def at_gateway() -> int:
        answer = await g.figures()
        return sum(version.requests for version in answer.versions) if answer is not None else 0

    before, seen = await at_servers(), await at_gateway()
    direct = FollowingClient(g.folder, g.python_address)
    try:
        await direct.ready()
        for _ in range(3):
            assert set(await direct.ask([f"user-{n}" for n in range(40)])) == {"1"}
        for _ in range(7):
            await client.infer(MODEL, [row])

        async def counted() -> bool:
            return await at_gateway() == seen + 7

        await eventually(counted, "the gateway's figures")
        grew = [now - was for now, was in zip(await at_servers(), before, strict=True)]
        assert sum(grew) == 3 * 40 + 7
        assert min(grew) > 20, "both versions are asked"
    finally:
        direct.close()
        await figures.close()
        await rollout.in_force(rollout.set(route(arm("1.0.0", *servers))))
