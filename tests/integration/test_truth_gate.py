"""The truth gate after the promotion: outcomes that come late, through the real drift monitor, take the version back inside the guard's window.

Bus, drift monitor, the controller's polls, evidence and reconciler are the real ones; servers and gateways are ready at once.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc.aio
import numpy as np
import pyarrow as pa
import pytest
import yaml
from millrace_api.drift.v1 import drift_pb2, drift_pb2_grpc
from millrace_api.events.v1 import events_pb2
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_drift_monitor.app import build
from millrace_drift_monitor.settings import DriftSettings
from millrace_kit.bus import PREDICTIONS, Outgoing, open_bus, records_topic
from millrace_kit.client import open_channel
from millrace_kit.server import Service, running
from millrace_kit.settings import BusSettings, ServiceSettings
from millrace_rollout_controller import manifest
from millrace_rollout_controller.evidence import Evidence, advance
from millrace_rollout_controller.goals import compared, tracked_values
from millrace_rollout_controller.peers import Figures
from millrace_rollout_controller.reconciler import ArmSeen, Item, Limits, Observed, RunServers, reconcile
from millrace_rollout_controller.state import Status, VersionRef

MODEL = "offers"
GATE = "{metric: business/revenue, compare: notWorseThanStable, margin: 2, better: Higher, valueRange: [0, 100], required: Never%s}"
AB_TEST = """
    strategy: ABTest
    abTest: {goal: business/revenue, better: Higher, valueRange: [0, 100]%s}
"""
CARRIERS = ("UA", "DL", "AA")
EACH = 40
"""Predictions of one version in one batch."""


def spec(version: str, segment: str, *, ab_test: bool = False) -> manifest.Spec:
    steps = f"""
        steps: [{{weight: 50}}, {{weight: 100}}]
        gates: [{GATE % segment}]
        guard: {{window: 1h}}
    """
    rollout = AB_TEST % segment if ab_test else steps
    document = {
        "apiVersion": "millrace.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": MODEL},
        "spec": {"model": MODEL, "version": version, "rollout": yaml.safe_load(rollout), "routing": {"sticky": {"header": "x-user"}}},
    }  # fmt: skip
    return manifest.parse(yaml.safe_dump(document)).spec


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    """Says where the model's outcomes are."""

    async def GetModel(self, request, context):
        outcome = registry_pb2.OutcomeSpec(contract="sales", subject_column="offer", label_column="sold", threshold=0.5)
        return registry_pb2.GetModelResponse(model=registry_pb2.Model(name=MODEL, outcome=outcome))

    async def GetVersion(self, request, context):
        return registry_pb2.GetVersionResponse(version=registry_pb2.ModelVersion(model=MODEL, version=request.version))


@dataclass
class World:
    """One deployment and everything that tells about it."""

    bus: object
    drift: drift_pb2_grpc.DriftServiceStub
    figures: Figures
    wanted: manifest.Spec
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    generation: int = 1
    status: Status = field(default_factory=Status)
    evidence: Evidence = field(default_factory=Evidence)
    servers: dict[str, int] = field(default_factory=dict)
    batches: int = 0

    def apply(self, wanted: manifest.Spec) -> None:
        self.wanted, self.generation = wanted, self.generation + 1

    async def tick(self) -> Status:
        self.now += timedelta(seconds=1)
        rollout, status = self.wanted.rollout, self.status
        self.figures.track(MODEL, tracked_values(rollout))
        poll = (await self.figures.poll([MODEL]))[MODEL]
        candidate = status.candidate.ref.version if status.candidate is not None and status.entered else ""
        self.evidence = advance(
            self.evidence, poll, trial=status.trial, step=status.step, candidate=candidate,
            stable=status.stable.ref.version if status.stable is not None else "", wanted=rollout.gates, gateways=(), now=self.now,
            compared=compared(self.wanted),
        )  # fmt: skip
        versions = {
            version: VersionRef(model=MODEL, version=version, digest=version * 3, platform="onnxruntime_onnx")
            for version in ("1.0.0", "1.1.0")
        }
        arms = {v: ArmSeen(tuple(f"{v}:{i}" for i in range(n)), n) for v, n in self.servers.items()}
        item, seen = Item(MODEL, self.wanted, self.generation), Observed(versions, arms)
        self.status, actions = reconcile(item, status, seen, self.evidence, self.now, limits=Limits(drain_s=1))
        self.servers = {one.ref.version: one.replicas for one in actions if isinstance(one, RunServers)}
        return self.status

    async def until(self, what, looks: int = 60) -> None:
        for _ in range(looks):
            if what(await self.tick()):
                return
        raise AssertionError(f"{self.status.phase}: {self.status.waiting} {self.status.gates}")

    async def predict(self, batches: int) -> None:
        """Both versions' predictions; of 1.1.0 also as many by testers, and answers given again."""
        for batch in range(batches):
            made = []
            for version in ("1.0.0", "1.1.0"):
                for i in range(EACH * (1 if version == "1.0.0" else 3)):
                    p = events_pb2.Prediction(
                        prediction_id=f"{version}-{batch}-{i}", model=MODEL, version=version, subject=f"{version}-{batch}-{i}", outputs=[0.9],
                        pinned=EACH <= i < 2 * EACH, cached=i >= 2 * EACH,
                    )  # fmt: skip
                    p.predicted_at.FromDatetime(datetime.now(tz=UTC) - timedelta(minutes=5))
                    made.append(p)
            message = events_pb2.PredictionsMade(gateway_id="g", journal_offset=batch + 1, predictions=made)
            await self.bus.publish([Outgoing(PREDICTIONS, MODEL, message.SerializeToString())])

    async def sell(self, revenue) -> None:
        """The next batch's outcomes; `revenue` of (version, carrier)."""
        rng, rows = np.random.default_rng(self.batches), []
        for version in ("1.0.0", "1.1.0"):
            for i in range(EACH * (1 if version == "1.0.0" else 3)):
                carrier = CARRIERS[i % len(CARRIERS)]
                # Whatever is no evidence sells splendidly.
                worth = revenue(version, carrier) if i < EACH else 100.0
                rows.append((f"{version}-{self.batches}-{i}", True, carrier, min(100.0, worth * rng.exponential())))
        subjects, sold, carriers, revenues = zip(*rows, strict=True)
        table = pa.table({"offer": subjects, "sold": sold, "carrier": carriers, "revenue": revenues})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        self.batches += 1
        landed = events_pb2.RecordsLanded(
            contract="sales", arrow_ipc=sink.getvalue().to_pybytes(), source="s", source_offset=self.batches
        )
        await self.bus.publish([Outgoing(records_topic("sales"), "k", landed.SerializeToString())])
        await self.counted(lambda v: v.outcomes, EACH * self.batches)

    async def counted(self, what, expected: int) -> None:
        """Until the drift monitor has counted so many of each version."""
        async with asyncio.timeout(30):
            while True:
                answer = await self.drift.GetOutcomes(drift_pb2.GetOutcomesRequest(model=MODEL))
                if [what(v) for v in answer.versions] == [expected, expected]:
                    return
                await asyncio.sleep(0.02)


@pytest.fixture
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    registry = Service(
        "registry", [lambda server: registry_pb2_grpc.add_RegistryServiceServicer_to_server(Registry(), server)], []
    )
    buses = BusSettings(path=str(tmp_path / "bus.sqlite"))
    async with running(registry, ServiceSettings(drain_s=0)) as address:
        settings = DriftSettings(
            bus=buses, database_url=f"sqlite:///{tmp_path / 'drift.sqlite'}", registry_address=address, registry_retry_s=0.05, drain_s=1
        )  # fmt: skip
        async with running(await build(settings), settings) as drift, open_channel(drift) as channel:
            figures = Figures([], list, _no_gateway, channel, timeout_s=5)
            bus = await open_bus(buses)
            found = World(bus, drift_pb2_grpc.DriftServiceStub(channel), figures, spec("1.0.0", request.param))
            await found.until(lambda status: status.phase == "Promoted")
            yield found
            await bus.close()


def _no_gateway(address: str) -> grpc.aio.Channel:
    raise AssertionError(address)


async def guarded(world: World, segment: str) -> None:
    world.apply(spec("1.1.0", segment))
    await world.until(lambda status: status.candidate is not None and status.entered)
    await world.predict(batches=14)
    await world.counted(lambda v: v.predictions, 14 * EACH)
    await world.until(lambda status: status.guarding and status.step_since is not None)
    assert world.status.weight == 100


BY_CARRIER = ", segment: outcome/carrier"


@pytest.mark.parametrize("world", ["", BY_CARRIER], indirect=True, ids=["all", "by segment"])
async def test_late_outcomes_take_a_version_back_after_it_got_all_traffic(world: World) -> None:
    segment = world.wanted.rollout.gates[0].segment
    await guarded(world, BY_CARRIER if segment else "")
    for _ in range(14):
        # Where groups are judged, one carrier's buyers stay away and the others make up for it in the mean of all.
        await world.sell(lambda version, carrier: 20.0 if version == "1.0.0" else _worse(carrier, alone=bool(segment)))
        if (await world.tick()).phase in {"RollingBack", "RolledBack"}:
            break
    assert world.status.phase in {"RollingBack", "RolledBack"}, world.status.gates
    assert world.status.route is not None
    assert world.status.route.weight("1.0.0") == 100
    decision = world.status.history[-1]
    assert decision.decision == "GateFailed"
    assert ("segment 'UA' failed: candidate " in decision.gates[0].evidence) == bool(segment)
    assert world.batches >= 2


def _worse(carrier: str, *, alone: bool) -> float:
    if not alone:
        return 5.0
    return 1.0 if carrier == "UA" else 32.0


@pytest.mark.parametrize("world", [BY_CARRIER], indirect=True)
async def test_equal_outcomes_leave_it_where_it_is(world: World) -> None:
    await guarded(world, BY_CARRIER)
    for _ in range(14):
        await world.sell(lambda version, carrier: 20.0)
        await world.tick()
    assert world.status.guarding
    assert world.evidence.gates[0].candidate.n == 14 * EACH, "calls of testers and cached answers are no evidence"
    assert set(world.evidence.gates[0].segments) == set(CARRIERS)


@pytest.mark.parametrize("world", [BY_CARRIER], indirect=True)
async def test_an_ab_test_by_revenue_has_a_result_for_each_carrier(world: World) -> None:
    world.apply(spec("1.1.0", BY_CARRIER, ab_test=True))
    await world.until(lambda status: status.candidate is not None and status.entered and status.weight == 50)
    await world.predict(batches=14)
    await world.counted(lambda v: v.predictions, 14 * EACH)
    # Outcomes count from the first look at both versions.
    await world.tick()
    for _ in range(14):
        await world.sell(lambda version, carrier: 20.0 if version == "1.0.0" else _worse(carrier, alone=True))
        await world.tick()
    found = {one.segment: one for one in world.status.comparisons if one.metric == "business/revenue"}
    assert list(found) == ["", *sorted(CARRIERS)]
    assert found[""].candidate_samples == found[""].stable_samples == 14 * EACH
    assert [found[name].better for name in ("", "UA")] == ["undecided", "stable"], "hidden in the mean of all"
    assert all(found[name].lower < 12 < found[name].upper for name in ("DL", "AA"))
    assert found["UA"].lower < -19 < found["UA"].upper < 0
    assert (world.status.phase, world.status.weight) == ("Paused", 50), "a person decides"
