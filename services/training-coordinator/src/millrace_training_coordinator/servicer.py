"""The gRPC edge: check, call, convert."""

from collections.abc import AsyncIterator

import grpc
from millrace_api.training.v1 import training_pb2 as pb
from millrace_api.training.v1 import training_pb2_grpc
from millrace_kit import check

from millrace_training_coordinator import convert
from millrace_training_coordinator.coordinator import Coordinator
from millrace_training_coordinator.watch import Follower


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """`millrace_api.training.v1.TrainingService`."""

    def __init__(self, coordinator: Coordinator, follower: Follower) -> None:
        self._coordinator = coordinator
        self._follower = follower

    async def RegisterPipeline(
        self, request: pb.RegisterPipelineRequest, context: grpc.aio.ServicerContext
    ) -> pb.RegisterPipelineResponse:
        version = await self._coordinator.register(request.manifest_yaml, request.code_tar_gz)
        return pb.RegisterPipelineResponse(name=version.name, pipeline_hash=version.pipeline_hash)

    async def StartRun(self, request: pb.StartRunRequest, context: grpc.aio.ServicerContext) -> pb.StartRunResponse:
        run = await self._coordinator.start(convert.run_request(request))
        return pb.StartRunResponse(run=convert.to_run(run))

    async def GetRun(self, request: pb.GetRunRequest, context: grpc.aio.ServicerContext) -> pb.GetRunResponse:
        run = await self._coordinator.run(_run_id(request.id, "id"))
        return pb.GetRunResponse(run=convert.to_run(run))

    async def ListRuns(self, request: pb.ListRunsRequest, context: grpc.aio.ServicerContext) -> pb.ListRunsResponse:
        if request.pipeline:
            check.name(request.pipeline, "pipeline")
        runs = await self._coordinator.runs(request.pipeline, check.page_size(request.page_size, "page_size"))
        return pb.ListRunsResponse(runs=[convert.to_run(run) for run in runs])

    async def CancelRun(self, request: pb.CancelRunRequest, context: grpc.aio.ServicerContext) -> pb.CancelRunResponse:
        run = await self._coordinator.cancel(_run_id(request.id, "id"))
        return pb.CancelRunResponse(run=convert.to_run(run))

    async def WatchRun(
        self, request: pb.WatchRunRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchRunResponse]:
        async for event in self._follower.follow(_run_id(request.id, "id")):
            yield convert.to_watch_event(event)

    async def Reproduce(self, request: pb.ReproduceRequest, context: grpc.aio.ServicerContext) -> pb.ReproduceResponse:
        return convert.to_reproduction(await self._coordinator.reproduce(_run_id(request.run_id, "run_id")))


def _run_id(value: str, field: str) -> str:
    return convert.plain_text(value, field, limit=convert.MAX_ID)
