"""The gRPC edge of historical features: check, call, convert."""

import asyncio

import grpc.aio
import pyarrow as pa
from millrace_api.common.v1.common_pb2 import TableVersion
from millrace_api.feature.v1 import offline_pb2, offline_pb2_grpc
from millrace_kit import check
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError

from millrace_feature.catalog import Catalog
from millrace_feature.lake import Lake
from millrace_feature.offline.historical import Historical, historical_features
from millrace_feature.settings import FeatureSettings
from millrace_feature.versioning.access import Access, Caller
from millrace_feature.versioning.servicer import caller_of


class OfflineServicer(offline_pb2_grpc.OfflineServiceServicer):
    """`millrace_api.feature.v1.OfflineService`."""

    def __init__(self, *, catalog: Catalog, lake: Lake, access: Access, settings: FeatureSettings) -> None:
        self._catalog = catalog
        self._lake = lake
        self._access = access
        self._turns = asyncio.Semaphore(settings.max_builds)
        self._limit = settings.max_builds + settings.max_queued_builds
        self._waiting = 0

    async def GetHistoricalFeatures(
        self, request: offline_pb2.GetHistoricalFeaturesRequest, context: grpc.aio.ServicerContext
    ) -> offline_pb2.GetHistoricalFeaturesResponse:
        if not request.features:
            raise InvalidArgumentError("features", "names none")
        column = check.text(request.event_time_column, "event_time_column", limit=256)
        if self._waiting >= self._limit:
            raise ResourceExhaustedError("max_queued_builds", f"{self._waiting} requests run or wait; retry later")
        self._waiting += 1
        try:
            async with self._turns:
                return await asyncio.to_thread(self._answer, request, column, caller_of(context))
        finally:
            self._waiting -= 1

    def _answer(
        self, request: offline_pb2.GetHistoricalFeaturesRequest, column: str, caller: Caller
    ) -> offline_pb2.GetHistoricalFeaturesResponse:
        if not self._access.is_open:
            self._access.check_features(caller, request.features)
        if request.definitions_hash:
            stored = self._catalog.get(check.sha256(request.definitions_hash, "definitions_hash"))
        else:
            current = self._catalog.current()
            if current is None:
                raise FailedPreconditionError("NO_DEFINITIONS", "no definitions are applied yet")
            stored = current
        pinned = {item.table: item.version for item in request.table_versions}
        found: Historical = historical_features(
            self._lake,
            stored.definitions,
            list(request.features),
            _rows(request.rows),
            event_time=column,
            pinned=pinned,
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, found.features.schema) as writer:
            writer.write_table(found.features)
        return offline_pb2.GetHistoricalFeaturesResponse(
            features=sink.getvalue().to_pybytes(),
            definitions_hash=stored.definitions.digest,
            table_versions=[TableVersion(table=t, version=v) for t, v in sorted(found.versions.items())],
        )


def _rows(content: bytes) -> pa.Table:
    try:
        with pa.ipc.open_stream(content) as stream:
            return stream.read_all()
    except (pa.ArrowException, OSError) as error:
        raise InvalidArgumentError("rows", "is no Arrow IPC stream") from error
