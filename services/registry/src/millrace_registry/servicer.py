"""The gRPC edge: check the request, call the domain, convert the answer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import grpc.aio
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_kit import check
from millrace_kit.content import CHUNK_BYTES
from millrace_kit.errors import InvalidArgumentError

from millrace_registry import convert
from millrace_registry.artifacts import Artifacts
from millrace_registry.stages import APPROVABLE
from millrace_registry.store import SqlStore

Context: TypeAlias = grpc.aio.ServicerContext


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """Answers `RegistryService`.

    Args:
        store: models, versions, audit.
        artifacts: their files.
        changed: called after each change, to have it announced without delay.
    """

    def __init__(self, store: SqlStore, artifacts: Artifacts, changed: Callable[[], None]) -> None:
        self._store = store
        self._artifacts = artifacts
        self._changed = changed

    async def CreateModel(
        self, request: registry_pb2.CreateModelRequest, context: Context
    ) -> registry_pb2.CreateModelResponse:
        model, created = await asyncio.to_thread(self._store.create_model, convert.model_in(request.model))
        return registry_pb2.CreateModelResponse(model=convert.model_out(model), created=created)

    async def GetModel(self, request: registry_pb2.GetModelRequest, context: Context) -> registry_pb2.GetModelResponse:
        model = await asyncio.to_thread(self._store.model, check.name(request.name, "name"))
        return registry_pb2.GetModelResponse(model=convert.model_out(model))

    async def ListModels(
        self, request: registry_pb2.ListModelsRequest, context: Context
    ) -> registry_pb2.ListModelsResponse:
        models = await asyncio.to_thread(self._store.models)
        return registry_pb2.ListModelsResponse(models=[convert.model_out(model) for model in models])

    async def PutArtifact(
        self, request_iterator: AsyncIterator[registry_pb2.PutArtifactRequest], context: Context
    ) -> registry_pb2.PutArtifactResponse:
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgumentError("header", "must come first")
        sha256 = check.sha256(first.header.sha256, "header.sha256")
        existed = await self._artifacts.put(sha256, first.header.size_bytes, _chunks(request_iterator))
        return registry_pb2.PutArtifactResponse(sha256=sha256, existed=existed)

    async def GetArtifact(
        self, request: registry_pb2.GetArtifactRequest, context: Context
    ) -> AsyncIterator[registry_pb2.GetArtifactResponse]:
        async for chunk in self._artifacts.read(check.sha256(request.sha256, "sha256")):
            yield registry_pb2.GetArtifactResponse(chunk=chunk)

    async def RegisterVersion(
        self, request: registry_pb2.RegisterVersionRequest, context: Context
    ) -> registry_pb2.RegisterVersionResponse:
        content = convert.content_in(request.version)
        actor = convert.actor_in(request.actor)
        await asyncio.to_thread(self._store.model, content.model)
        await self._artifacts.check(content.artifacts)
        version, created = await asyncio.to_thread(self._store.register, content, actor)
        self._changed()
        return registry_pb2.RegisterVersionResponse(version=convert.version_out(version), created=created)

    async def GetVersion(
        self, request: registry_pb2.GetVersionRequest, context: Context
    ) -> registry_pb2.GetVersionResponse:
        model = check.name(request.model, "model")
        name = check.semver(request.version, "version") if request.version else ""
        version = await asyncio.to_thread(self._store.version, model, name)
        return registry_pb2.GetVersionResponse(version=convert.version_out(version))

    async def ListVersions(
        self, request: registry_pb2.ListVersionsRequest, context: Context
    ) -> registry_pb2.ListVersionsResponse:
        versions = await asyncio.to_thread(self._store.versions, check.name(request.model, "model"))
        return registry_pb2.ListVersionsResponse(versions=[convert.version_out(version) for version in versions])

    async def Approve(self, request: registry_pb2.ApproveRequest, context: Context) -> registry_pb2.ApproveResponse:
        stage = convert.stage_in(request.to_stage, "to_stage")
        if stage not in APPROVABLE:
            raise InvalidArgumentError("to_stage", f"{stage} takes no approval")
        version = await asyncio.to_thread(
            self._store.approve,
            check.name(request.model, "model"),
            check.semver(request.version, "version"),
            stage,
            convert.actor_in(request.actor),
            check.optional_text(request.comment, "comment"),
        )
        self._changed()
        return registry_pb2.ApproveResponse(version=convert.version_out(version))

    async def TransitionStage(
        self, request: registry_pb2.TransitionStageRequest, context: Context
    ) -> registry_pb2.TransitionStageResponse:
        if request.expected_revision < 0:
            raise InvalidArgumentError("expected_revision", "must not be negative")
        version = await asyncio.to_thread(
            self._store.transition,
            check.name(request.model, "model"),
            check.semver(request.version, "version"),
            convert.stage_in(request.to_stage, "to_stage"),
            convert.actor_in(request.actor),
            request.expected_revision,
        )
        self._changed()
        return registry_pb2.TransitionStageResponse(version=convert.version_out(version))

    async def RecordRollout(
        self, request: registry_pb2.RecordRolloutRequest, context: Context
    ) -> registry_pb2.RecordRolloutResponse:
        model, version = check.name(request.model, "model"), check.semver(request.version, "version")
        actor = convert.actor_in(request.actor)
        rollout = convert.rollout_in(request.rollout)
        await self._artifacts.check_one(rollout.evidence, "rollout.evidence_size_bytes")
        created = await asyncio.to_thread(self._store.record_rollout, model, version, rollout, actor)
        return registry_pb2.RecordRolloutResponse(created=created)

    async def ListAudit(
        self, request: registry_pb2.ListAuditRequest, context: Context
    ) -> registry_pb2.ListAuditResponse:
        model = check.name(request.model, "model") if request.model else ""
        size = check.page_size(request.page_size, "page_size")
        after = check.page_token(request.page_token, "page_token")
        entries = await asyncio.to_thread(self._store.audit_page, model, after, size)
        token = str(entries[-1].id) if len(entries) == size else ""
        return registry_pb2.ListAuditResponse(
            entries=[convert.audit_out(entry) for entry in entries], next_page_token=token
        )


async def _chunks(requests: AsyncIterator[registry_pb2.PutArtifactRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise InvalidArgumentError("chunk", f"must follow the header, in pieces of at most {CHUNK_BYTES} bytes")
        yield request.chunk
