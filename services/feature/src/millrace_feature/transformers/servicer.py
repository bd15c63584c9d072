"""The gRPC edge of transformers and selections: check, call, convert."""

import grpc.aio
from millrace_api.feature.v1 import transformers_pb2, transformers_pb2_grpc
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

from millrace_feature.transformers.artifact import MAX_STEPS
from millrace_feature.transformers.rights import Rights
from millrace_feature.transformers.service import Transformers


class TransformerServicer(transformers_pb2_grpc.TransformerServiceServicer):
    """`millrace_api.feature.v1.TransformerService`."""

    def __init__(self, transformers: Transformers, rights: Rights) -> None:
        self._transformers = transformers
        self._rights = rights

    async def FitTransformer(
        self, request: transformers_pb2.FitTransformerRequest, context: grpc.aio.ServicerContext
    ) -> transformers_pb2.FitTransformerResponse:
        name = check.name(request.name, "name")
        training_set = check.sha256(request.training_set, "training_set")
        if not 1 <= len(request.steps) <= MAX_STEPS:
            raise InvalidArgumentError("steps", f"needs 1 to {MAX_STEPS} steps")
        await self._rights.check(context, training_set)
        found = await self._transformers.fit(name, training_set, request.steps)
        return transformers_pb2.FitTransformerResponse(transformer=found)

    async def GetTransformer(
        self, request: transformers_pb2.GetTransformerRequest, context: grpc.aio.ServicerContext
    ) -> transformers_pb2.GetTransformerResponse:
        found = await self._transformers.transformer(check.name(request.name, "name"), _version(request.version))
        await self._rights.check(context, found.training_set)
        return transformers_pb2.GetTransformerResponse(transformer=found)

    async def ListTransformers(
        self, request: transformers_pb2.ListTransformersRequest, context: grpc.aio.ServicerContext
    ) -> transformers_pb2.ListTransformersResponse:
        found = await self._transformers.transformers(_optional_name(request.name))
        allowed = await self._rights.allowed(context, {item.training_set for item in found})
        return transformers_pb2.ListTransformersResponse(transformers=[t for t in found if t.training_set in allowed])

    async def RecordSelection(
        self, request: transformers_pb2.RecordSelectionRequest, context: grpc.aio.ServicerContext
    ) -> transformers_pb2.RecordSelectionResponse:
        check.name(request.selection.name, "selection.name")
        training_set = check.sha256(request.selection.training_set, "selection.training_set")
        await self._rights.check(context, training_set)
        kept = await self._transformers.record_selection(request.selection)
        return transformers_pb2.RecordSelectionResponse(selection=kept)

    async def GetSelection(
        self, request: transformers_pb2.GetSelectionRequest, context: grpc.aio.ServicerContext
    ) -> transformers_pb2.GetSelectionResponse:
        found = await self._transformers.selection(check.name(request.name, "name"), _version(request.version))
        await self._rights.check(context, found.training_set)
        return transformers_pb2.GetSelectionResponse(selection=found)

    async def ListSelections(
        self, request: transformers_pb2.ListSelectionsRequest, context: grpc.aio.ServicerContext
    ) -> transformers_pb2.ListSelectionsResponse:
        found = await self._transformers.selections(_optional_name(request.name))
        allowed = await self._rights.allowed(context, {item.training_set for item in found})
        return transformers_pb2.ListSelectionsResponse(selections=[s for s in found if s.training_set in allowed])


def _optional_name(name: str) -> str:
    return check.name(name, "name") if name else ""


def _version(version: int) -> int:
    if version < 0:
        raise InvalidArgumentError("version", "must not be negative")
    return version
