"""One base for every error that crosses a process border, and its two ways across gRPC.

Each error carries exactly one `google.rpc.ErrorInfo` (AIP-193): a stable `reason` in UPPER_SNAKE and a `metadata` map with
every variable of the message. Bad input also carries `google.rpc.BadRequest` naming the field.
"""

from collections.abc import Mapping, Sequence

import grpc
from google.protobuf.any_pb2 import Any as AnyProto
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "millrace.dev"


class MillraceError(Exception):
    """An error a caller can tell apart.

    Args:
        code: gRPC status code.
        reason: stable identifier in UPPER_SNAKE, at most 63 characters.
        message: brief and actionable, for people.
        metadata: every variable of the message.
    """

    def __init__(
        self, code: grpc.StatusCode, reason: str, message: str, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})

    def to_status(self) -> status_pb2.Status:
        """The `google.rpc.Status` that carries this error."""
        details = [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)]
        field = self.metadata.get("field")
        if self.code is grpc.StatusCode.INVALID_ARGUMENT and field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=self.message)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        status = status_pb2.Status(code=code_pb2.Code.Value(self.code.name), message=self.message)
        for detail in details:
            packed = AnyProto()
            packed.Pack(detail)
            status.details.append(packed)
        return status

    @classmethod
    def from_rpc(cls, error: grpc.RpcError) -> "MillraceError":
        """The error a Millrace service sent, or the bare gRPC status with reason `RPC_<CODE>`."""
        code: grpc.StatusCode = error.code()
        message: str = error.details() or code.name
        try:
            status = rpc_status.from_call(error)
        except (ValueError, AttributeError, TypeError):
            status = None
        for packed in status.details if status is not None else ():
            info = error_details_pb2.ErrorInfo()
            if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR) and packed.Unpack(info):
                return cls(code, info.reason, message, dict(info.metadata))
        return cls(code, f"RPC_{code.name}", message)


class InvalidArgumentError(MillraceError):
    """The request is wrong whatever the state of the service; `field` names where (`batch.rows[3].age`)."""

    def __init__(self, field: str, problem: str, reason: str = "INVALID_FIELD") -> None:
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, reason, f"{field}: {problem}", {"field": field})
        self.field = field


class NotFoundError(MillraceError):
    """The named thing does not exist."""

    def __init__(self, kind: str, name: str) -> None:
        reason = f"{kind.upper().replace(' ', '_')}_NOT_FOUND"
        super().__init__(grpc.StatusCode.NOT_FOUND, reason, f"no {kind} named {name!r}", {"kind": kind, "name": name})


class AlreadyExistsError(MillraceError):
    """Another thing with that name is there."""

    def __init__(self, kind: str, name: str, difference: str) -> None:
        super().__init__(
            grpc.StatusCode.ALREADY_EXISTS,
            f"{kind.upper().replace(' ', '_')}_EXISTS",
            f"{kind} {name!r} exists and differs: {difference}",
            {"kind": kind, "name": name},
        )


class FailedPreconditionError(MillraceError):
    """The request is right but the state of the service forbids it."""

    def __init__(self, reason: str, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(grpc.StatusCode.FAILED_PRECONDITION, reason, message, metadata)


class PermissionDeniedError(MillraceError):
    """This service takes no calls from this client."""

    def __init__(self, method: str, client_names: Sequence[str]) -> None:
        client = ", ".join(client_names) or "(no name)"
        super().__init__(
            grpc.StatusCode.PERMISSION_DENIED,
            "CLIENT_NOT_ALLOWED",
            f"{method} is not for the client {client}; the service's allowed_clients says who may call it",
            {"client": client, "method": method},
        )


class ConflictError(MillraceError):
    """Somebody else changed it first; read again and retry."""

    def __init__(self, reason: str, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(grpc.StatusCode.ABORTED, reason, message, metadata)


class UnavailableError(MillraceError):
    """Something needed does not answer now; retry later."""

    def __init__(self, reason: str, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(grpc.StatusCode.UNAVAILABLE, reason, message, metadata)


class ResourceExhaustedError(MillraceError):
    """A named limit is reached."""

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED", message, {"limit": limit})


class DataLossError(MillraceError):
    """Stored content is not what its digest says."""

    def __init__(self, reason: str, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(grpc.StatusCode.DATA_LOSS, reason, message, metadata)
