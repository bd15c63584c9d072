"""The gRPC edge of sources."""

import grpc
from millrace_api.ingestion.v1 import sources_pb2 as pb
from millrace_api.ingestion.v1.sources_pb2_grpc import SourceServiceServicer
from millrace_kit import check

from millrace_ingestion.sources.convert import source_from, source_to, status_to
from millrace_ingestion.sources.supervisor import Supervisor
from millrace_ingestion.sources.topic_source import Lanes


class SourceServicer(SourceServiceServicer):
    """The service's RPCs.

    Args:
        supervisor: the sources.
        lanes: where batches of producers ended.
    """

    def __init__(self, supervisor: Supervisor, lanes: Lanes) -> None:
        self._supervisor = supervisor
        self._lanes = lanes

    async def RegisterSource(
        self, request: pb.RegisterSourceRequest, context: grpc.aio.ServicerContext
    ) -> pb.RegisterSourceResponse:
        source, created = await self._supervisor.register(source_from(request.source, "source"))
        return pb.RegisterSourceResponse(source=source_to(source), created=created)

    async def ListSources(
        self, request: pb.ListSourcesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListSourcesResponse:
        found = await self._supervisor.list(check.name(request.name, "name") if request.name else "")
        return pb.ListSourcesResponse(
            sources=[
                pb.SourceWithStatus(source=source_to(source), status=status_to(source, standing, progress))
                for source, standing, progress in found
            ]
        )

    async def PauseSource(
        self, request: pb.PauseSourceRequest, context: grpc.aio.ServicerContext
    ) -> pb.PauseSourceResponse:
        await self._supervisor.pause(check.name(request.name, "name"))
        return pb.PauseSourceResponse()

    async def ResumeSource(
        self, request: pb.ResumeSourceRequest, context: grpc.aio.ServicerContext
    ) -> pb.ResumeSourceResponse:
        await self._supervisor.resume(check.name(request.name, "name"))
        return pb.ResumeSourceResponse()

    async def RunSource(self, request: pb.RunSourceRequest, context: grpc.aio.ServicerContext) -> pb.RunSourceResponse:
        await self._supervisor.look(check.name(request.name, "name"))
        return pb.RunSourceResponse()

    async def RemoveSource(
        self, request: pb.RemoveSourceRequest, context: grpc.aio.ServicerContext
    ) -> pb.RemoveSourceResponse:
        await self._supervisor.remove(check.name(request.name, "name"))
        return pb.RemoveSourceResponse()

    async def GetPosition(
        self, request: pb.GetPositionRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetPositionResponse:
        contract = check.table(request.contract, "contract")
        source = check.text(request.source, "source", limit=512)
        return pb.GetPositionResponse(offset=await self._lanes.position(contract, source))
