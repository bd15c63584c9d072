"""Rollouts of equal versions through the real gateway: how many are rolled back, and how soon a bad one is. `make perf AREA=aa_rollouts N=50`.

The controller and the gateway (Envoy and its Python process) are the real ones; the gates look at every report of the gateway's figures. Two
model servers stand in for Triton, fail with the same chance, and take turns as candidate. Then versions that fail three times as often
are tried, beside the candidate requests that Wald's sequential test would expect (two arms: his test of untied pairs; one arm: against the known rate).
"""

import asyncio
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import grpc
import grpc.aio
import yaml
from millrace_api.rollout.v1 import rollout_pb2
from millrace_api.rollout.v1.rollout_pb2_grpc import RolloutServiceStub
from millrace_kit.server import running
from millrace_rollout_controller import app
from millrace_rollout_controller.executor import PoolSeen, Wanted
from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.plans import ArmSeen
from millrace_rollout_controller.settings import RolloutSettings
from scipy.stats import beta

from tests.perf import failing_model
from tests.perf.controller import ROOT, _tests
from tests.perf.harness import FOLDER, machine, quantile

sys.path.insert(0, str(ROOT / "services" / "inference-gateway" / "tests"))

N = int(os.environ.get("N", "50"))
BAD = int(os.environ.get("BAD", str(max(3, N // 5))))
RATE, TIMES = 0.02, 3.0
ALPHA = 0.05
CLIENTS = 16
ONE_S = 600.0
"""Longest time of one rollout."""
ROLLOUT = {
    "steps": [{"weight": 50}],
    "gates": [{"metric": "errorRate", "compare": "notWorseThanStable", "margin": RATE, "confidence": 1 - ALPHA}],
}
INFER = "/inference.GRPCInferenceService/ModelInfer"


class StandIns:
    """An executor whose servers are there already: each version gets the one that no other version has."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._endpoints = endpoints
        self._given: dict[tuple[str, str], str] = {}

    def check(self, spec: Spec) -> None:
        """Everything can be had."""

    async def start(self) -> None:
        """Nothing is left over."""

    async def converge(self, wanted: Sequence[Wanted], in_use: frozenset[str] | None) -> None:
        """Give and take back."""
        names = [(one.deployment, one.ref.version) for one in wanted]
        self._given = {name: at for name, at in self._given.items() if name in names or in_use is None or at in in_use}
        for name in names:
            free = [at for at in self._endpoints if at not in self._given.values()]
            if name not in self._given and free:
                self._given[name] = free[0]

    def seen(self) -> Mapping[tuple[str, str], ArmSeen]:
        """Every server is ready."""
        return {name: ArmSeen((at,), 1) for name, at in self._given.items()}

    def pools(self) -> Mapping[str, PoolSeen]:
        """There are none."""
        return {}

    async def close(self) -> None:
        """They are not ours to end."""

    def at(self, version: str) -> str:
        """Where a version is; empty for nowhere."""
        return next((at for (_, name), at in self._given.items() if name == version), "")


@dataclass
class Ended:
    """One rollout."""

    decision: str
    candidate_requests: int
    seconds: float


class Driver:
    """Applies one version after the other and waits for what becomes of it."""

    def __init__(self, stub: RolloutServiceStub, contents: dict[str, bytes], model: bytes, servers: StandIns) -> None:
        self._stub = stub
        self._contents = contents
        self._model = model
        self._servers = servers
        self._count = 0

    async def one(self, rate: float) -> Ended:
        """A new version whose server fails with chance `rate`."""
        version = f"1.0.{self._count}"
        self._count += 1
        self._contents[version] = self._model
        manifest = {
            "apiVersion": "millrace.dev/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": {"name": failing_model.MODEL},
            "spec": {"model": failing_model.MODEL, "version": version, "rollout": ROLLOUT},
        }
        began = time.monotonic()
        await self._stub.Apply(rollout_pb2.ApplyRequest(manifest_yaml=yaml.safe_dump(manifest)))
        told = False
        while time.monotonic() - began < ONE_S:
            if not told and (at := self._servers.at(version)):
                # Before its first weight: servers have to be in the route first.
                await failing_model.fail(at, rate)
                told = True
            request = rollout_pb2.GetDeploymentRequest(name=failing_model.MODEL)
            found = (await self._stub.GetDeployment(request)).deployment
            if found.observed_generation == found.generation and found.phase in {"Promoted", "RolledBack"}:
                samples = found.gates[0].candidate_samples if found.gates else 0
                return Ended(found.phase, samples, time.monotonic() - began)
            await asyncio.sleep(0.02)
        raise TimeoutError(f"{version} is not decided after {ONE_S:.0f} s")


async def callers(address: str, tally: dict[str, int]) -> None:
    """Closed-loop callers through Envoy."""
    from load import infer_request

    body = infer_request().SerializeToString()
    metadata = [("x-millrace-model", failing_model.MODEL)]

    async def one(channel: grpc.aio.Channel) -> None:
        call = channel.unary_unary(INFER)
        while True:
            try:
                await call(body, metadata=metadata, timeout=10)
                tally["ok"] += 1
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                if code not in tally and code != "INTERNAL":
                    print(f"{code}: {error.details()}", file=sys.stderr)
                tally[code] = tally.get(code, 0) + 1

    channels = [grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(2)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    try:
        await asyncio.gather(*(one(channels[number % 2]) for number in range(CLIENTS)))
    finally:
        for channel in channels:
            await channel.close()


@asynccontextmanager
async def world(folder: Path, support: ModuleType, peers: ModuleType) -> Any:
    """A controller, a gateway that follows it, two model servers and callers; gives the driver and what the callers were told."""
    import gateway as gateways

    with failing_model.running(gateways.free_ports(2)) as endpoints:
        servers = StandIns(endpoints)
        async with peers.serving(peers.Peers()) as around:
            listen = f"127.0.0.1:{gateways.free_ports(1)[0]}"
            made = gateways.Gateway(folder, rollout_address=listen, bus={"path": str(folder / "bus.sqlite")})
            settings = RolloutSettings(
                listen=listen, state_dir=str(folder), database_url=f"sqlite:///{folder}/rollout.sqlite", registry_address=around.address,
                gateway_addresses=(made.python_address,), drift_address=around.address, drain_s=0.1, tick_s=0.05, poll_s=0.2,
            )  # fmt: skip
            with mock.patch.object(app, "LocalExecutor", return_value=servers):
                service = await app.build(settings)
            try:
                async with running(service, settings) as address, grpc.aio.insecure_channel(address) as channel:
                    made.start_envoy()
                    made.start_python()
                    driver = Driver(RolloutServiceStub(channel), around.contents, support.onnx_model(0.1), servers)
                    await driver.one(RATE)
                    tally = {"ok": 0}
                    calling = asyncio.create_task(callers(made.public, tally))
                    try:
                        yield driver, tally
                    finally:
                        calling.cancel()
                        with suppress(asyncio.CancelledError):
                            await calling
            finally:
                await made.close()


def wald(good: float, bad: float, alpha: float, power: float) -> dict[str, float]:
    """Candidate requests that Wald's test expects to need to refuse a bad version, when its rates are known beforehand."""
    needed = power * math.log(power / alpha) + (1 - power) * math.log((1 - power) / (1 - alpha))

    def divergence(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    one, other = bad * (1 - good), good * (1 - bad)
    return {
        "one_arm": needed / divergence(bad, good),
        "two_arms": needed / divergence(one / (one + other), 0.5) / (one + other),
    }


async def measure() -> dict[str, Any]:
    """Equal versions, then bad ones."""
    _, peers, support = _tests()
    with tempfile.TemporaryDirectory(prefix="aa-") as name:
        async with world(Path(name), support, peers) as (driver, tally):
            equal = [await _told("equal", number, N, driver, RATE) for number in range(N)]
            bad = [await _told("bad", number, BAD, driver, RATE * TIMES) for number in range(BAD)]
    return _result(equal, bad, tally)


async def _told(kind: str, number: int, of: int, driver: Driver, rate: float) -> Ended:
    ended = await driver.one(rate)
    print(f"{kind} {number + 1} of {of}: {ended.decision} after {ended.candidate_requests} candidate requests, {ended.seconds:.1f} s", file=sys.stderr)  # fmt: skip
    return ended


def _result(equal: Sequence[Ended], bad: Sequence[Ended], tally: Mapping[str, int]) -> dict[str, Any]:
    false = sum(one.decision == "RolledBack" for one in equal)
    promoted = sorted(one.candidate_requests for one in equal if one.decision == "Promoted")
    caught = sorted(one.candidate_requests for one in bad if one.decision == "RolledBack")
    expected = wald(RATE, RATE * TIMES, ALPHA, 1 - ALPHA)
    mean = sum(caught) / len(caught) if caught else math.nan
    return {
        "machine": machine(),
        "error_rate": RATE,
        "bad_times": TIMES,
        "equal": {
            "rollouts": len(equal),
            "false_rollbacks": false,
            "false_share": false / len(equal),
            "false_share_at_most_95": float(beta.ppf(0.95, false + 1, len(equal) - false)),
            "nominal": ALPHA,
            "requests_to_promotion": {
                "median": quantile(promoted, 0.5), "p90": quantile(promoted, 0.9), "max": promoted[-1]
            } if promoted else {},
        },
        "bad": {
            "rollouts": len(bad),
            "rolled_back": len(caught),
            "candidate_requests": {"mean": mean, "max": caught[-1]} if caught else {},
            "wald_expected": expected,
            "times_wald_two_arms": mean / expected["two_arms"],
            "times_wald_one_arm": mean / expected["one_arm"],
            "goal_times": 3.0,
        },
        "calls": dict(tally),
        "failed_calls_but_told_to_fail": sum(count for code, count in tally.items() if code not in {"ok", "INTERNAL"}),
    }  # fmt: skip


def main() -> None:
    """Run and print."""
    found = asyncio.run(measure())
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "aa_rollouts.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: found[key] for key in ("equal", "bad", "failed_calls_but_told_to_fail")}, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
