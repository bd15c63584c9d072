"""Asks every service, each for itself: one that does not answer is shown as down and hides nothing of the others."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import grpc.aio
from millrace_api.drift.v1 import drift_pb2, drift_pb2_grpc
from millrace_api.feature.v1 import feature_pb2, feature_pb2_grpc
from millrace_api.ingestion.v1 import ingestion_pb2, ingestion_pb2_grpc
from millrace_api.prediction.v1 import prediction_pb2, prediction_pb2_grpc
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_api.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from millrace_api.training.v1 import training_pb2, training_pb2_grpc
from millrace_kit.client import open_channel
from millrace_kit.errors import MillraceError

from millrace_console.settings import ConsoleSettings

T = TypeVar("T")

CONSISTENCY = timedelta(hours=3)
"""How far back served values are compared with the lake's on the page."""
SERVICES = ("ingestion", "feature", "training", "registry", "rollout", "gateway", "drift")


@dataclass
class Answers:
    """What the services said in one round; None where one did not answer."""

    problems: dict[str, str] = field(default_factory=dict)
    """Service -> why it did not answer."""
    contracts: ingestion_pb2.ListContractsResponse | None = None
    tables: list[ingestion_pb2.GetTableResponse] = field(default_factory=list)
    dead_letters: ingestion_pb2.CountDeadLettersResponse | None = None
    progress: feature_pb2.GetProgressResponse | None = None
    consistency: feature_pb2.GetConsistencyResponse | None = None
    runs: training_pb2.ListRunsResponse | None = None
    versions: list[registry_pb2.ModelVersion] | None = None
    deployments: rollout_pb2.ListDeploymentsResponse | None = None
    figures: prediction_pb2.GetFiguresResponse | None = None
    findings: drift_pb2.ListFindingsResponse | None = None
    outcomes: list[drift_pb2.OutcomeFigures] = field(default_factory=list)


class Sources:
    """Channels to the services, and a round of questions at most every `refresh_s`."""

    def __init__(self, settings: ConsoleSettings) -> None:
        self._settings = settings
        addresses = {name: getattr(settings, f"{name}_address") for name in SERVICES}
        self._channels = {
            name: open_channel(address, timeout_s=settings.call_timeout_s, tls=settings.tls)
            for name, address in addresses.items()
        }
        self._lock = asyncio.Lock()
        self._last = Answers()
        self._asked_at = float("-inf")
        self._models: set[str] = set()

    async def latest(self) -> Answers:
        """The newest answers; asks again when they are older than `refresh_s`."""
        async with self._lock:
            now = asyncio.get_running_loop().time()
            if now - self._asked_at >= self._settings.refresh_s:
                self._last = await self._ask()
                self._asked_at = asyncio.get_running_loop().time()
            return self._last

    async def _ask(self) -> Answers:
        answers = Answers()
        parts: dict[str, Callable[[Any, Answers], Awaitable[None]]] = {
            "ingestion": self._ingestion,
            "feature": self._feature,
            "training": self._training,
            "registry": self._registry,
            "rollout": self._rollout,
            "gateway": self._gateway,
            "drift": self._drift,
        }

        async def guarded(name: str, part: Callable[[Any, Answers], Awaitable[None]]) -> None:
            try:
                await part(self._channels[name], answers)
            except grpc.aio.AioRpcError as error:
                answers.problems[name] = MillraceError.from_rpc(error).message

        await asyncio.gather(*(guarded(name, part) for name, part in parts.items()))
        return answers

    async def _ingestion(self, channel: grpc.aio.Channel, answers: Answers) -> None:
        stub = ingestion_pb2_grpc.IngestionServiceStub(channel)
        contracts = await stub.ListContracts(ingestion_pb2.ListContractsRequest())
        answers.tables = list(
            await asyncio.gather(
                *(
                    stub.GetTable(ingestion_pb2.GetTableRequest(contract=contract.name))
                    for contract in contracts.contracts
                )
            )
        )
        answers.dead_letters = await stub.CountDeadLetters(ingestion_pb2.CountDeadLettersRequest())
        answers.contracts = contracts

    async def _feature(self, channel: grpc.aio.Channel, answers: Answers) -> None:
        stub = feature_pb2_grpc.FeatureServiceStub(channel)
        answers.progress = await stub.GetProgress(feature_pb2.GetProgressRequest())
        request = feature_pb2.GetConsistencyRequest(max_findings=self._settings.rows)
        request.time_range.start.FromDatetime(datetime.now(tz=UTC) - CONSISTENCY)
        answers.consistency = await stub.GetConsistency(request)

    async def _training(self, channel: grpc.aio.Channel, answers: Answers) -> None:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        answers.runs = await stub.ListRuns(training_pb2.ListRunsRequest(page_size=self._settings.rows))

    async def _registry(self, channel: grpc.aio.Channel, answers: Answers) -> None:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        models = (await stub.ListModels(registry_pb2.ListModelsRequest())).models
        self._models = {model.name for model in models}
        lists = await asyncio.gather(
            *(stub.ListVersions(registry_pb2.ListVersionsRequest(model=model.name)) for model in models)
        )
        answers.versions = [version for found in lists for version in found.versions][: self._settings.rows]

    async def _rollout(self, channel: grpc.aio.Channel, answers: Answers) -> None:
        stub = rollout_pb2_grpc.RolloutServiceStub(channel)
        answers.deployments = await stub.ListDeployments(rollout_pb2.ListDeploymentsRequest())

    async def _gateway(self, channel: grpc.aio.Channel, answers: Answers) -> None:
        stub = prediction_pb2_grpc.GatewayServiceStub(channel)
        answers.figures = await stub.GetFigures(prediction_pb2.GetFiguresRequest())

    async def _drift(self, channel: grpc.aio.Channel, answers: Answers) -> None:
        stub = drift_pb2_grpc.DriftServiceStub(channel)
        found = await stub.ListFindings(drift_pb2.ListFindingsRequest(page_size=self._settings.rows))
        # The registry's answer of the round before: this round's may still be on its way.
        models = {finding.model for finding in found.findings} | self._models
        outcomes = await asyncio.gather(
            *(stub.GetOutcomes(drift_pb2.GetOutcomesRequest(model=model)) for model in sorted(models))
        )
        answers.outcomes = [figures for answer in outcomes for figures in answer.versions]
        answers.findings = found

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close()
