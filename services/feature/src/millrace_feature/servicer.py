"""The gRPC edge: check, call, convert."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence

import grpc
import grpc.aio
from millrace_api.feature.v1 import feature_pb2, feature_pb2_grpc
from millrace_kit import check
from millrace_kit.bus import TopicPartition, records_topic
from millrace_kit.call_door import DoorCall
from millrace_kit.clock import Clock
from millrace_kit.errors import FailedPreconditionError
from prometheus_client import Counter

from millrace_feature.builder import Builder
from millrace_feature.catalog import Catalog
from millrace_feature.consistency.log import ConsistencyLog
from millrace_feature.consistency.messages import to_response
from millrace_feature.convert import (
    Aged,
    RowReader,
    optional_us,
    rows_in_bounds,
    to_answer,
    to_progress,
    to_services,
)
from millrace_feature.definitions import Applier
from millrace_feature.float_parts import VectorTable
from millrace_feature.metrics import READ_FEATURES, READ_ROWS
from millrace_feature.serving import MISSING, PRESENT, Serving, Vectors
from millrace_feature.store import Followed
from millrace_feature.versioning.access import Access, Caller
from millrace_feature.versioning.servicer import caller_of
from millrace_feature.worker import StreamWorker, to_us

SERVICE = "millrace_api.feature.v1.FeatureService"
Ends = Callable[[], Awaitable[Mapping[TopicPartition, int]]]


class FeatureServicer(feature_pb2_grpc.FeatureServiceServicer):
    """`millrace_api.feature.v1.FeatureService`."""

    def __init__(
        self,
        *,
        applier: Applier,
        builder: Builder,
        catalog: Catalog,
        serving: Serving[RowReader],
        worker: StreamWorker,
        ends: Ends,
        consistency: ConsistencyLog,
        access: Access,
        clock: Clock,
    ) -> None:
        self._applier = applier
        self._builder = builder
        self._catalog = catalog
        self._serving = serving
        self._worker = worker
        self._ends = ends
        self._consistency = consistency
        self._access = access
        self._clock = clock

    async def ApplyDefinitions(
        self, request: feature_pb2.ApplyDefinitionsRequest, context: grpc.aio.ServicerContext
    ) -> feature_pb2.ApplyDefinitionsResponse:
        project = check.name(request.project, "project")
        digest, changed = await self._applier.apply(project, request.feast_registry, caller_of(context))
        return feature_pb2.ApplyDefinitionsResponse(definitions_hash=digest, changed=changed)

    async def GetDefinitions(
        self, request: feature_pb2.GetDefinitionsRequest, context: grpc.aio.ServicerContext
    ) -> feature_pb2.GetDefinitionsResponse:
        if request.definitions_hash:
            digest = check.sha256(request.definitions_hash, "definitions_hash")
            stored = await asyncio.to_thread(self._catalog.get, digest)
        else:
            current = await asyncio.to_thread(self._catalog.current)
            if current is None:
                raise FailedPreconditionError("NO_DEFINITIONS", "no definitions are applied yet")
            stored = current
        definitions = stored.definitions
        return feature_pb2.GetDefinitionsResponse(
            project=definitions.project,
            definitions_hash=definitions.digest,
            feast_registry=stored.registry,
            feature_services=to_services(definitions),
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Have `server` answer the service's methods; the answers of online reads are bytes already."""
        read = grpc.unary_unary_rpc_method_handler(
            self.GetOnlineFeatures, feature_pb2.GetOnlineFeaturesRequest.FromString, lambda content: content
        )
        feature_pb2_grpc.add_FeatureServiceServicer_to_server(self, server)
        server.add_registered_method_handlers(SERVICE, {"GetOnlineFeatures": read})  # in place of the generated one

    async def GetOnlineFeatures(  # type: ignore[override]  # see `add_to`
        self, request: feature_pb2.GetOnlineFeaturesRequest, context: grpc.aio.ServicerContext
    ) -> bytes:
        return await self._read(request, lambda: caller_of(context))

    async def read(self, call: DoorCall) -> bytes:
        """`GetOnlineFeatures` for whoever comes by the door; the answer's bytes."""
        request = feature_pb2.GetOnlineFeaturesRequest.FromString(call.message)
        return await self._read(request, lambda: Caller(tuple(call.client_names)))

    async def _read(self, request: feature_pb2.GetOnlineFeaturesRequest, caller: Callable[[], Caller]) -> bytes:
        name = check.text(request.feature_service, "feature_service", limit=256)
        await self._may_read(caller, "read_online", name)
        rows_in_bounds(request.rows)
        given_us = optional_us(request, "event_time", "event_time")
        at_us = given_us if given_us is not None else to_us(self._clock.now())
        wanted = check.sha256(request.definitions_hash, "definitions_hash") if request.definitions_hash else ""
        ready = self._serving.service(name, wanted)
        service, entities = ready.service, ready.reader.read(request.rows)
        vectors, age_ms, ages_ms = await self._serving.read_aged(
            service, entities, at_us, may_be_kept=given_us is None, by_view=request.with_view_ages
        )
        _count(name, vectors)
        aged = Aged(service.view_names, ages_ms) if ages_ms is not None else None
        return to_answer(service.plan.features, vectors, ready.digest, age_ms, aged)

    async def BuildTrainingSet(
        self, request: feature_pb2.BuildTrainingSetRequest, context: grpc.aio.ServicerContext
    ) -> feature_pb2.BuildTrainingSetResponse:
        if request.feature_service:
            await self._may_read(lambda: caller_of(context), "read_offline", request.feature_service)
        if request.features and not self._access.is_open:
            await asyncio.to_thread(self._access.check_features, caller_of(context), request.features)
        return feature_pb2.BuildTrainingSetResponse(training_set=await self._builder.build(request))

    async def _may_read(self, caller: Callable[[], Caller], action: str, name: str) -> None:
        if not self._access.is_open:
            await asyncio.to_thread(self._access.check, caller(), action, "FeatureService", name)

    async def GetTrainingSet(
        self, request: feature_pb2.GetTrainingSetRequest, context: grpc.aio.ServicerContext
    ) -> feature_pb2.GetTrainingSetResponse:
        digest = check.sha256(request.digest, "digest")
        record = await asyncio.to_thread(self._catalog.training_set, digest)
        return feature_pb2.GetTrainingSetResponse(training_set=feature_pb2.TrainingSet.FromString(record))

    async def GetProgress(
        self, request: feature_pb2.GetProgressRequest, context: grpc.aio.ServicerContext
    ) -> feature_pb2.GetProgressResponse:
        ends = await self._ends()
        store = self._serving.store
        positions, followed, entities = await asyncio.to_thread(
            lambda: (store.positions(), store.followed(), store.entities())
        )
        self._worker.note_lag(ends, positions)
        progress = []
        for contract in self._worker.contracts:
            topic = records_topic(contract)
            next_offset = sum(offset for place, offset in positions.items() if place.topic == topic)
            end_offset = sum(offset for place, offset in ends.items() if place.topic == topic)
            progress.append(to_progress(contract, followed.get(contract, Followed()), next_offset, end_offset))
        served = self._serving.definitions
        return feature_pb2.GetProgressResponse(
            contracts=progress, entities=entities, definitions_hash=served.digest if served else ""
        )

    async def GetConsistency(
        self, request: feature_pb2.GetConsistencyRequest, context: grpc.aio.ServicerContext
    ) -> feature_pb2.GetConsistencyResponse:
        return await asyncio.to_thread(to_response, self._consistency, request)


def _count(service: str, vectors: Vectors) -> None:
    if isinstance(vectors, VectorTable):
        rows, total = vectors.marks.shape
        total *= rows
        present, missing = vectors.count(PRESENT), vectors.count(MISSING)
    else:
        rows, total = len(vectors), sum(len(vector.statuses) for vector in vectors)
        present, missing = (sum(vector.statuses.count(mark) for vector in vectors) for mark in (PRESENT, MISSING))
    counted = _counters(service)
    for counter, count in zip(counted, (rows, present, missing, total - present - missing), strict=True):
        if count:
            counter.inc(count)


@functools.lru_cache(maxsize=1024)
def _counters(service: str) -> Sequence[Counter]:
    """Rows, then features that are present, missing and expired."""
    by_status = [READ_FEATURES.labels(service, status) for status in ("present", "missing", "expired")]
    return [READ_ROWS.labels(service), *by_status]
