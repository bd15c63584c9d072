"""The gRPC edge of versions, pins and the audit: check, call, convert."""

import asyncio
from datetime import datetime, timedelta

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.feature.v1 import versions_pb2, versions_pb2_grpc
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError
from millrace_kit.interceptors import client_names

from millrace_feature.catalog import Catalog, Stored
from millrace_feature.convert import optional_us
from millrace_feature.definitions import Applier
from millrace_feature.plan import Definitions
from millrace_feature.rows import EPOCH
from millrace_feature.versioning.access import Audit, Caller
from millrace_feature.versioning.changes import Change, changes_between
from millrace_feature.versioning.history import Pin, Versions

KINDS = {
    "added": versions_pb2.CHANGE_KIND_ADDED,
    "changed": versions_pb2.CHANGE_KIND_CHANGED,
    "removed": versions_pb2.CHANGE_KIND_REMOVED,
}
MAX_PAGE = 1000


def caller_of(context: grpc.aio.ServicerContext) -> Caller:
    """Who calls."""
    return Caller(tuple(client_names(context)))


class DefinitionsServicer(versions_pb2_grpc.DefinitionsServiceServicer):
    """`millrace_api.feature.v1.DefinitionsService`."""

    def __init__(self, *, applier: Applier, catalog: Catalog, versions: Versions, audit: Audit) -> None:
        self._applier = applier
        self._catalog = catalog
        self._versions = versions
        self._audit = audit

    async def ListDefinitions(
        self, request: versions_pb2.ListDefinitionsRequest, context: grpc.aio.ServicerContext
    ) -> versions_pb2.ListDefinitionsResponse:
        limit, before = _page(request.page_size, 50), _before(request.page_token)
        rows, live, pins = await asyncio.to_thread(
            lambda: (
                self._versions.history(before=before, limit=limit + 1),
                self._versions.live(),
                self._versions.pins(),
            )
        )
        answer = versions_pb2.ListDefinitionsResponse(pins=[_pin(pin) for pin in pins])
        for i, row in enumerate(rows[:limit]):
            answer.applied.add(
                definitions_hash=row.digest,
                project=row.project,
                at=_stamp(row.at),
                author=row.author,
                rollback=row.rollback,
                in_force=before is None and i == 0 and live[:1] == (row.digest,),
            )
        if len(rows) > limit:
            answer.next_page_token = str(rows[limit - 1].number)
        return answer

    async def DiffDefinitions(
        self, request: versions_pb2.DiffDefinitionsRequest, context: grpc.aio.ServicerContext
    ) -> versions_pb2.DiffDefinitionsResponse:
        if bool(request.to_hash) == bool(request.feast_registry):
            raise InvalidArgumentError("to_hash", "give either it or feast_registry")
        before, after = await asyncio.to_thread(self._both, request)
        changes = await asyncio.to_thread(changes_between, before.registry, after.registry)
        groups = {view.group for view in before.definitions.views}
        answer = versions_pb2.DiffDefinitionsResponse(
            from_hash=before.definitions.digest, to_hash=after.definitions.digest
        )
        for change in changes:
            answer.changes.add(
                kind=KINDS[change.kind],
                type=change.type,
                name=change.name,
                fields=change.fields,
                refill=_is_filled_anew(change, after.definitions, groups),
            )
        return answer

    def _both(self, request: versions_pb2.DiffDefinitionsRequest) -> tuple[Stored, Stored]:
        if request.from_hash:
            before = self._catalog.get(check.sha256(request.from_hash, "from_hash"))
        else:
            before = self._catalog.current() or Stored(Definitions("", "", (), (), (), ()), b"")
        if request.to_hash:
            return before, self._catalog.get(check.sha256(request.to_hash, "to_hash"))
        return before, self._applier.compiled(check.name(request.project, "project"), request.feast_registry)

    async def RollbackDefinitions(
        self, request: versions_pb2.RollbackDefinitionsRequest, context: grpc.aio.ServicerContext
    ) -> versions_pb2.RollbackDefinitionsResponse:
        digest = check.sha256(request.definitions_hash, "definitions_hash")
        changed = await self._applier.roll_back(digest, caller_of(context))
        return versions_pb2.RollbackDefinitionsResponse(definitions_hash=digest, changed=changed)

    async def PinDefinitions(
        self, request: versions_pb2.PinDefinitionsRequest, context: grpc.aio.ServicerContext
    ) -> versions_pb2.PinDefinitionsResponse:
        digest = check.sha256(request.definitions_hash, "definitions_hash")
        until_us = optional_us(request, "until", "until")
        until = EPOCH + timedelta(microseconds=until_us) if until_us is not None else None
        pin = Pin(digest, check.text(request.name, "name", limit=64), until)
        await self._applier.pin(pin, caller_of(context))
        return versions_pb2.PinDefinitionsResponse(pin=_pin(pin))

    async def UnpinDefinitions(
        self, request: versions_pb2.UnpinDefinitionsRequest, context: grpc.aio.ServicerContext
    ) -> versions_pb2.UnpinDefinitionsResponse:
        digest = check.sha256(request.definitions_hash, "definitions_hash")
        await self._applier.unpin(digest, check.text(request.name, "name", limit=64), caller_of(context))
        return versions_pb2.UnpinDefinitionsResponse()

    async def ListAudit(
        self, request: versions_pb2.ListAuditRequest, context: grpc.aio.ServicerContext
    ) -> versions_pb2.ListAuditResponse:
        limit, before = _page(request.page_size, 100), _before(request.page_token)
        rows = await asyncio.to_thread(
            lambda: self._audit.entries(before=before, limit=limit + 1, denied_only=request.denied_only)
        )
        answer = versions_pb2.ListAuditResponse()
        for row in rows[:limit]:
            answer.entries.add(
                at=_stamp(row.at),
                caller=row.caller,
                action=row.action,
                resource=row.resource,
                allowed=row.allowed,
                detail=row.detail,
            )
        if len(rows) > limit:
            answer.next_page_token = str(rows[limit - 1].number)
        return answer


def _is_filled_anew(change: Change, after: Definitions, groups: set[str]) -> bool:
    view = next((view for view in after.views if view.name == change.name), None)
    return change.type.endswith("FeatureView") and view is not None and view.group not in groups


def _page(asked: int, default: int) -> int:
    if not 0 <= asked <= MAX_PAGE:
        raise InvalidArgumentError("page_size", f"must be 0 to {MAX_PAGE}")
    return asked or default


def _before(token: str) -> int | None:
    if not token:
        return None
    if not (token.isascii() and token.isdigit() and len(token) < 18):
        raise InvalidArgumentError("page_token", "is none that this service gave")
    return int(token)


def _pin(pin: Pin) -> versions_pb2.Pin:
    return versions_pb2.Pin(
        definitions_hash=pin.digest, name=pin.name, until=_stamp(pin.until) if pin.until is not None else None
    )


def _stamp(instant: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(instant)
    return stamp
