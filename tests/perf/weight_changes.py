"""A thousand changes of the weights under load, through the real Envoy: failed calls, and how long until callers see each. `make perf AREA=weight_changes N=1000`.

Each change turns all traffic from one version to the other, which is the most a change can do. Seen is the first answer of the version that comes;
over is the begin of the last call that the version that goes still answered. Both count from the moment the controller publishes the routes.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from tests.perf import failing_model
from tests.perf.harness import FOLDER, Ratio, machine, quantile

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "services" / "inference-gateway" / "tests"), str(ROOT / "tools")]

N = int(os.environ.get("N", "1000"))
PACE_S = 0.05
"""Shortest time between two changes."""
STEADY_S = 0.03
"""Time without an answer of the version that goes, after which a change is over."""
SEEN_S = 30.0
"""Longest time of one change."""
CLIENTS = 8
SEEN_P99_MS = 1000.0
"""Goal: a change is over for callers within this."""
INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass
class Answers:
    """What callers were told."""

    calls: int = 0
    failed: list[str] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)
    """By version: when its first answer since the last change came."""
    begun: dict[str, float] = field(default_factory=dict)
    """By version: when the newest call that it answered was begun."""


async def call_on(address: str, answers: Answers) -> None:
    """Closed-loop callers, each on a connection of its own."""
    from load import infer_request

    body = infer_request().SerializeToString()
    metadata = [("x-millrace-model", failing_model.MODEL)]

    async def one() -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            await channel.channel_ready()
            call = channel.unary_unary(INFER, response_deserializer=service_pb2.ModelInferResponse.FromString)
            while True:
                began = time.monotonic()
                try:
                    version = (await call(body, metadata=metadata, timeout=10)).model_version
                except grpc.aio.AioRpcError as error:
                    answers.failed.append(f"{error.code().name}: {error.details()}")
                    continue
                answers.calls += 1
                answers.first.setdefault(version, time.monotonic())
                answers.begun[version] = max(began, answers.begun.get(version, 0.0))

    await asyncio.gather(*(one() for _ in range(CLIENTS)))


async def change(rollout: Any, routes: Any, answers: Answers, comes: str, goes: str) -> tuple[float, float]:
    """Publish routes; milliseconds until the change is seen, and until it is over."""
    answers.first.clear()
    began = time.monotonic()
    rollout.set(routes)
    while comes not in answers.first or time.monotonic() - answers.begun.get(goes, 0.0) < STEADY_S:
        if time.monotonic() - began > SEEN_S:
            raise TimeoutError(f"callers do not see a change after {SEEN_S:.0f} s")
        await asyncio.sleep(0.002)
    over = max(0.0, answers.begun.get(goes, began) - began)
    return (answers.first[comes] - began) * 1000, over * 1000


async def measure() -> dict[str, Any]:
    """All changes."""
    import gateway as gateways

    ports = gateways.free_ports(2)
    names = [str(port) for port in ports]
    answers, seen, over = Answers(), list[float](), list[float]()
    with failing_model.running(ports) as (one, other):
        async with gateways.gateway() as (made, rollout):

            def routes(weight: float) -> Any:
                stable = gateways.arm("1.0.0", one, weight=100 - weight)
                candidate = gateways.arm("1.1.0", other, weight=weight, role=gateways.CANDIDATE)
                return gateways.route(stable, candidate, timeout_ms=10_000)

            await rollout.in_force(rollout.set(routes(0.0)))
            calling = asyncio.create_task(call_on(made.public, answers))
            try:
                await gateways.eventually(lambda: asyncio.sleep(0, answers.calls), "an answer")
                for number in range(N):
                    goes, comes = (names[0], names[1]) if number % 2 == 0 else (names[1], names[0])
                    found = await change(rollout, routes(100.0 if number % 2 == 0 else 0.0), answers, comes, goes)
                    seen.append(found[0])
                    over.append(found[1])
                    await asyncio.sleep(PACE_S)
            finally:
                calling.cancel()
                await asyncio.gather(calling, return_exceptions=True)
    return _result(answers, seen, over)


def _result(answers: Answers, seen: Sequence[float], over: Sequence[float]) -> dict[str, Any]:
    def told(values: Sequence[float]) -> dict[str, float]:
        ordered = sorted(values)
        return {"p50": quantile(ordered, 0.5), "p99": quantile(ordered, 0.99), "max": ordered[-1]}

    goals = [
        Ratio.at_most("failed calls", len(answers.failed), 0.0),
        Ratio.at_most("ms until a change is over, p99", told(over)["p99"], SEEN_P99_MS),
    ]
    return {
        "machine": machine(),
        "changes": len(seen),
        "calls": answers.calls,
        "failed": len(answers.failed),
        "failures": answers.failed[:10],
        "seen_ms": told(seen),
        "over_ms": told(over),
        "goals": {goal.name: {"value": goal.value, "goal": goal.goal, "holds": goal.holds} for goal in goals},
    }


def main() -> None:
    """Run and print."""
    found = asyncio.run(measure())
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "weight_changes.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if key != "machine"}, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
