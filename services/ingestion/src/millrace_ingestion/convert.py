"""Between the protobuf messages and the domain; every wrong field is refused here, by name."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1.common_pb2 import TableVersion
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

from millrace_ingestion.checks import REASONS
from millrace_ingestion.contract_messages import change_to
from millrace_ingestion.contracts import Compatibility
from millrace_ingestion.ingestor import Comparison
from millrace_ingestion.lake import LogEntry
from millrace_ingestion.letter_store import Choice
from millrace_ingestion.models import HeldBatch, Incoming, Letter, LetterCount, Outcome, Pin, TableState

MAX_SOURCE = 256
MAX_OFFSET = 2**62
MAX_IDS = 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Printable, so that a source can stand in a message header, a file's statistics and every database.
_SOURCE = re.compile(r"[^\x00-\x20\x7f_][^\x00-\x1f\x7f]{0,255}")


def comparison_to(comparison: Comparison) -> pb.CheckContractResponse:
    """What a contract would change, as a message."""
    newest, problem = comparison.newest, comparison.problem
    mode = newest.compatibility if newest is not None else Compatibility.UNSPECIFIED
    return pb.CheckContractResponse(
        changes=[change_to(change) for change in comparison.changes],
        compatibility=pb.Compatibility.Value(f"COMPATIBILITY_{mode.value}"),
        compatible=problem is None,
        problem=problem.message if problem is not None else "",
        subject=problem.metadata.get("column", "") if problem is not None else "",
        newest_version=newest.version if newest is not None else 0,
    )


def incoming_from(message: pb.RecordBatch, field: str) -> Incoming:
    """A batch whose fields are right; its payload is not looked at.

    Raises:
        InvalidArgumentError: naming the field.
    """
    check.table(message.contract, f"{field}.contract")
    check.text(message.source, f"{field}.source", limit=MAX_SOURCE)
    if not _SOURCE.fullmatch(message.source):
        raise InvalidArgumentError(
            f"{field}.source", "needs printable characters and must not begin with '_' (reserved) or a space"
        )
    if not 1 <= message.offset <= MAX_OFFSET:
        raise InvalidArgumentError(f"{field}.offset", "must be 1 to 2^62")
    match message.WhichOneof("payload"):
        case "arrow_ipc":
            return Incoming(message.contract, message.source, message.offset, arrow_ipc=message.arrow_ipc)
        case "json_lines":
            return Incoming(message.contract, message.source, message.offset, json_lines=message.json_lines)
        case _:
            raise InvalidArgumentError(f"{field}.payload", "needs arrow_ipc or json_lines")


def outcome_to(outcome: Outcome) -> pb.WriteResponse:
    """A batch's outcome as a message."""
    return pb.WriteResponse(
        contract=outcome.contract,
        source=outcome.source,
        offset=outcome.offset,
        accepted=outcome.accepted,
        duplicates=outcome.duplicates,
        rejected=outcome.rejected,
        replayed=outcome.replayed,
        table_version=outcome.table_version,
        quarantined=outcome.quarantined,
    )


def reason_from(value: str, field: str) -> str:
    """A dead letter's reason; empty is every reason.

    Raises:
        InvalidArgumentError: no dead letter can have it.
    """
    if value and value not in REASONS:
        raise InvalidArgumentError(field, f"is none of {', '.join(REASONS)}")
    return value


def choice_from(
    request: pb.ListDeadLettersRequest | pb.ReplayDeadLettersRequest | pb.DiscardDeadLettersRequest,
) -> Choice:
    """Which dead letters a request is about.

    Raises:
        InvalidArgumentError: naming the field.
    """
    return Choice(
        check.table(request.contract, "contract"),
        reason_from(request.reason, "reason"),
        check.optional_text(request.column, "column", limit=MAX_SOURCE),
        check.optional_text(request.source, "source", limit=MAX_SOURCE),
        instant_from(request, "since"),
        instant_from(request, "until"),
    )


def instant_from(
    request: pb.ListDeadLettersRequest
    | pb.ReplayDeadLettersRequest
    | pb.DiscardDeadLettersRequest
    | pb.GetQualityRequest,
    field: Literal["since", "until"],
) -> int | None:
    """Microseconds since the epoch of an optional instant.

    Raises:
        InvalidArgumentError: it is outside years 1 to 9999.
    """
    if not request.HasField(field):
        return None
    return (check.timestamp(getattr(request, field), field) - _EPOCH) // _MICROSECOND


def limit_from(value: int, field: str) -> int | None:
    """How many at most; 0 is all.

    Raises:
        InvalidArgumentError: it is negative.
    """
    if value < 0:
        raise InvalidArgumentError(field, "must not be negative; 0 is all")
    return value or None


def letter_to(letter: Letter) -> pb.DeadLetter:
    """A dead letter as a message."""
    received_at = Timestamp()
    received_at.FromDatetime(letter.received_at)
    origin = letter.origin
    return pb.DeadLetter(
        id=letter.id,
        contract=letter.contract,
        source=letter.source,
        offset=letter.offset,
        reason=letter.reason,
        column=letter.column,
        detail=letter.detail,
        record_json=letter.record_json,
        received_at=received_at,
        replayed=letter.replayed,
        stage=letter.stage,
        exception=letter.exception,
        origin=None
        if origin is None
        else pb.RecordOrigin(
            topic=origin.topic,
            partition=origin.partition,
            offset=origin.offset,
            timestamp_ms=origin.timestamp_ms,
            key=origin.key,
            value=origin.value,
            headers=[pb.RecordHeader(name=name, value=value) for name, value in origin.headers],
        ),
    )


def ids_from(values: Sequence[int], field: str) -> Sequence[int]:
    """Ids of batches, at most 1000.

    Raises:
        InvalidArgumentError: there are more.
    """
    if len(values) > MAX_IDS:
        raise InvalidArgumentError(field, f"has more than {MAX_IDS} ids")
    return tuple(values)


def held_to(held: HeldBatch) -> pb.QuarantinedBatch:
    """A quarantined batch as a message."""
    received_at = Timestamp()
    received_at.FromDatetime(held.received_at)
    return pb.QuarantinedBatch(
        id=held.id,
        contract=held.contract,
        source=held.source,
        offset=held.offset,
        reason=held.reason,
        column=held.column,
        detail=held.detail,
        rows=held.rows,
        received_at=received_at,
        released=held.released,
        discarded=held.discarded,
    )


def count_to(count: LetterCount) -> pb.DeadLetterCount:
    """A count as a message."""
    return pb.DeadLetterCount(contract=count.contract, reason=count.reason, count=count.count, replayed=count.replayed)


def pin_to(pin: Pin) -> pb.TablePin:
    """A pin as a message."""
    message = pb.TablePin(version=pin.version, owner=pin.owner)
    if pin.expires_at is not None:
        message.expires_at.FromDatetime(pin.expires_at)
    return message


def version_to(entry: LogEntry, pins: Sequence[Pin]) -> pb.TableVersionInfo:
    """A table version as a message."""
    message = pb.TableVersionInfo(
        version=entry.version, operation=entry.operation, added_rows=entry.added_rows, pins=map(pin_to, pins)
    )
    message.committed_at.FromDatetime(entry.at)
    return message


def owner_from(value: str, field: str) -> str:
    """Who pins.

    Raises:
        InvalidArgumentError: it is empty or too long.
    """
    return check.text(value, field, limit=MAX_SOURCE)


def version_from(value: int, field: str) -> int:
    """A table version.

    Raises:
        InvalidArgumentError: it is negative.
    """
    if value < 0:
        raise InvalidArgumentError(field, "must not be negative")
    return value


def table_to(state: TableState) -> pb.GetTableResponse:
    """A table's state as a message."""
    return pb.GetTableResponse(
        table=TableVersion(table=state.contract, version=state.version), url=state.url, rows=state.rows
    )
