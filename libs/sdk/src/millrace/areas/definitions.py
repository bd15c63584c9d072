"""Versions of feature definitions: history, differences, rollback, pins and the audit."""

from collections.abc import Iterator
from datetime import datetime

import grpc
from millrace_api.feature.v1 import versions_pb2 as versions
from millrace_api.feature.v1.versions_pb2_grpc import DefinitionsServiceStub

from millrace.transport import LONG_TIMEOUT_S, call
from millrace.values import to_timestamp

PAGE = 200


class DefinitionsArea:
    """Looks after versions of definitions; `Client.features.apply` makes them."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = DefinitionsServiceStub(channel)

    def history(self) -> Iterator[versions.AppliedDefinitions]:
        """Every time definitions came into force, newest first."""
        token = ""
        while True:
            request = versions.ListDefinitionsRequest(page_size=PAGE, page_token=token)
            answer: versions.ListDefinitionsResponse = call(self.stub.ListDefinitions, request)
            yield from answer.applied
            token = answer.next_page_token
            if not token:
                return

    def pins(self) -> list[versions.Pin]:
        """Definitions that are served besides those in force."""
        answer: versions.ListDefinitionsResponse = call(
            self.stub.ListDefinitions, versions.ListDefinitionsRequest(page_size=1)
        )
        return list(answer.pins)

    def diff(
        self, *, to_hash: str = "", from_hash: str = "", project: str = "", feast_registry: bytes = b""
    ) -> versions.DiffDefinitionsResponse:
        """What differs between two versions, or between the one in force and a registry that is not applied."""
        request = versions.DiffDefinitionsRequest(
            from_hash=from_hash, to_hash=to_hash, project=project, feast_registry=feast_registry
        )
        answer: versions.DiffDefinitionsResponse = call(self.stub.DiffDefinitions, request)
        return answer

    def roll_back(self, definitions_hash: str) -> bool:
        """Put earlier definitions in force; False when they are."""
        request = versions.RollbackDefinitionsRequest(definitions_hash=definitions_hash)
        answer: versions.RollbackDefinitionsResponse = call(self.stub.RollbackDefinitions, request, LONG_TIMEOUT_S)
        return answer.changed

    def pin(self, definitions_hash: str, name: str, until: datetime | None = None) -> None:
        """Have definitions served beside those in force, for reads that name their hash."""
        request = versions.PinDefinitionsRequest(
            definitions_hash=definitions_hash, name=name, until=to_timestamp(until) if until else None
        )
        call(self.stub.PinDefinitions, request, LONG_TIMEOUT_S)

    def unpin(self, definitions_hash: str, name: str) -> None:
        """Take a pin away."""
        call(self.stub.UnpinDefinitions, versions.UnpinDefinitionsRequest(definitions_hash=definitions_hash, name=name))

    def audit(self, *, denied_only: bool = False) -> Iterator[versions.AuditEntry]:
        """Changes and refusals, newest first."""
        token = ""
        while True:
            request = versions.ListAuditRequest(page_size=PAGE, page_token=token, denied_only=denied_only)
            answer: versions.ListAuditResponse = call(self.stub.ListAudit, request)
            yield from answer.entries
            token = answer.next_page_token
            if not token:
                return
