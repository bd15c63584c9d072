"""The edge: check a request, call, convert the answer."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
from millrace_api.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from millrace_kit import check
from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError, UnavailableError

from millrace_rollout_controller import convert, pooling
from millrace_rollout_controller.actions import Verb
from millrace_rollout_controller.controller import Controller
from millrace_rollout_controller.deployments import Deployments
from millrace_rollout_controller.hub import Hub
from millrace_rollout_controller.store import Row

WATCH_CHECK_S = 1.0
"""Longest time between two looks at a watched deployment."""
MAX_GENERATION = 1 << 53
_VERBS: dict[int, Verb] = {
    rollout_pb2.VERB_PROMOTE: "promote",
    rollout_pb2.VERB_PAUSE: "pause",
    rollout_pb2.VERB_RESUME: "resume",
    rollout_pb2.VERB_ABORT: "abort",
    rollout_pb2.VERB_UNDO: "undo",
    rollout_pb2.VERB_SET_WEIGHT: "set-weight",
}


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    """`RolloutService`."""

    def __init__(
        self, deployments: Deployments, controller: Controller, hub: Hub, clock: Clock, *, max_gateways: int
    ) -> None:
        self._deployments = deployments
        self._controller = controller
        self._hub = hub
        self._clock = clock
        self._max_gateways = max_gateways
        self._streams = 0

    def _seen(self, row: Row) -> rollout_pb2.Deployment:
        return convert.deployment(row, self._controller.place(row.name))

    async def Apply(
        self, request: rollout_pb2.ApplyRequest, context: grpc.aio.ServicerContext
    ) -> rollout_pb2.ApplyResponse:
        row, result = await asyncio.to_thread(self._deployments.apply, request.manifest_yaml)
        self._controller.wake()
        return rollout_pb2.ApplyResponse(deployment=self._seen(row), result=result)

    async def GetDeployment(
        self, request: rollout_pb2.GetDeploymentRequest, context: grpc.aio.ServicerContext
    ) -> rollout_pb2.GetDeploymentResponse:
        row = await asyncio.to_thread(self._deployments.get, check.name(request.name, "name"))
        return rollout_pb2.GetDeploymentResponse(deployment=self._seen(row))

    async def ListDeployments(
        self, request: rollout_pb2.ListDeploymentsRequest, context: grpc.aio.ServicerContext
    ) -> rollout_pb2.ListDeploymentsResponse:
        rows = await asyncio.to_thread(self._deployments.rows)
        return rollout_pb2.ListDeploymentsResponse(deployments=[self._seen(row) for row in rows])

    async def WatchDeployment(
        self, request: rollout_pb2.WatchDeploymentRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[rollout_pb2.WatchDeploymentResponse]:
        name = check.name(request.name, "name")
        sent: rollout_pb2.Deployment | None = None
        while True:
            try:
                now = self._seen(await asyncio.to_thread(self._deployments.get, name))
            except NotFoundError:
                if sent is None:
                    raise
                return
            if now != sent:
                yield rollout_pb2.WatchDeploymentResponse(deployment=now)
                sent = now
            if self._controller.closed:
                return
            await self._controller.news(WATCH_CHECK_S)

    async def DeleteDeployment(
        self, request: rollout_pb2.DeleteDeploymentRequest, context: grpc.aio.ServicerContext
    ) -> rollout_pb2.DeleteDeploymentResponse:
        await asyncio.to_thread(self._deployments.delete, check.name(request.name, "name"))
        self._controller.wake()
        return rollout_pb2.DeleteDeploymentResponse()

    async def Act(self, request: rollout_pb2.ActRequest, context: grpc.aio.ServicerContext) -> rollout_pb2.ActResponse:
        name = check.name(request.name, "name")
        verb = _VERBS.get(request.verb)
        if verb is None:
            known = ", ".join(_VERBS.values())
            raise InvalidArgumentError("verb", f"must be one of {known}")
        weight = check.finite(request.weight, "weight")
        if weight and verb != "set-weight":
            raise InvalidArgumentError("weight", "belongs to VERB_SET_WEIGHT")
        if request.to and verb != "undo":
            raise InvalidArgumentError("to", "belongs to VERB_UNDO")
        to = check.optional_text(request.to, "to", limit=128)
        asked = weight if verb == "set-weight" else None
        row = await asyncio.to_thread(self._deployments.act, name, verb, asked, to)
        self._controller.wake()
        return rollout_pb2.ActResponse(deployment=self._seen(row))

    async def WakeVersion(
        self, request: rollout_pb2.WakeVersionRequest, context: grpc.aio.ServicerContext
    ) -> rollout_pb2.WakeVersionResponse:
        model, version = check.name(request.model, "model"), check.semver(request.version, "version")
        if not self._hub.serving:
            raise UnavailableError("NOT_LEADER", "this replica stands by; versions are the leader's to wake")
        status = await asyncio.to_thread(self._deployments.wake, model, version)
        self._controller.wake()
        arm = next((arm for arm in (status.stable, status.candidate) if arm and arm.ref.version == version), None)
        asleep = arm is not None and arm.sleep is not None
        waits = arm is not None and pooling.waits(arm)
        return rollout_pb2.WakeVersionResponse(asleep=asleep, waiting=status.waiting if waits else "")

    async def GetHistory(
        self, request: rollout_pb2.GetHistoryRequest, context: grpc.aio.ServicerContext
    ) -> rollout_pb2.GetHistoryResponse:
        row = await asyncio.to_thread(self._deployments.get, check.name(request.name, "name"))
        return rollout_pb2.GetHistoryResponse(decisions=[convert.decision(one) for one in row.status.history])

    async def WatchRoutes(
        self, request_iterator: AsyncIterator[rollout_pb2.WatchRoutesRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[rollout_pb2.WatchRoutesResponse]:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            return
        gateway = check.text(first.gateway_id, "gateway_id", limit=128)
        applied = _generation(first)
        if self._streams >= self._max_gateways:
            raise ResourceExhaustedError("max_gateways", f"{self._max_gateways} gateways are connected")
        figures_address = check.optional_text(first.figures_address, "figures_address", limit=300)
        self._hub.connected(gateway, applied, self._clock.now().timestamp(), figures_address)
        self._streams += 1
        self._controller.wake()
        reader = asyncio.create_task(self._read_acknowledgements(gateway, request_iterator))
        # Said at once, so that a new gateway knows whether to wait for routes before it takes calls.
        await context.send_initial_metadata((("x-millrace-generation", str(self._hub.table.generation)),))
        # A controller that never published says nothing: a gateway may hold good routes from before.
        sent = 0
        try:
            while True:
                news = asyncio.create_task(self._hub.newer(sent))
                await asyncio.wait({reader, news}, return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    news.cancel()
                    reader.result()
                    return
                table = news.result()
                if table is None:
                    return
                sent = table.generation
                yield rollout_pb2.WatchRoutesResponse(routes=convert.routes(table))
        finally:
            reader.cancel()
            self._streams -= 1
            self._hub.disconnected(gateway, self._clock.now().timestamp())

    async def _read_acknowledgements(
        self, gateway: str, requests: AsyncIterator[rollout_pb2.WatchRoutesRequest]
    ) -> None:
        async for request in requests:
            if request.gateway_id not in {"", gateway}:
                raise InvalidArgumentError("gateway_id", "must stay the same in one stream")
            self._hub.acknowledged(gateway, _generation(request), self._clock.now().timestamp())
            self._controller.wake()


def _generation(request: rollout_pb2.WatchRoutesRequest) -> int:
    if not 0 <= request.applied_generation < MAX_GENERATION:
        raise InvalidArgumentError("applied_generation", f"must be 0 to {MAX_GENERATION - 1}")
    return int(request.applied_generation)
