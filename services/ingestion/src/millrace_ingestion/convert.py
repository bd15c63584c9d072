"""Between the protobuf messages and the domain; every wrong field is refused here, by name."""

import re

from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1.common_pb2 import TableVersion
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

from millrace_ingestion.checks import REASONS
from millrace_ingestion.contracts import Column, ColumnType, Contract, validate
from millrace_ingestion.models import Incoming, Letter, LetterCount, Outcome, TableState

MAX_SOURCE = 256
MAX_OFFSET = 2**62
_PREFIX = "COLUMN_TYPE_"
# Printable, so that a source can stand in a message header, a file's statistics and every database.
_SOURCE = re.compile(r"[^\x00-\x20\x7f_][^\x00-\x1f\x7f]{0,255}")


def contract_from(message: pb.DataContract, field: str) -> Contract:
    """A validated contract; its version is 0, because the service numbers versions.

    Raises:
        InvalidArgumentError: naming the field.
    """
    if message.version < 0:
        raise InvalidArgumentError(f"{field}.version", "must not be negative; it is assigned on registration")
    columns = tuple(_column(column, f"{field}.columns[{index}]") for index, column in enumerate(message.columns))
    contract = Contract(
        message.name, 0, columns, message.event_id_column, message.event_time_column, tuple(message.key_columns)
    )
    return validate(contract, field)


def _column(message: pb.Column, field: str) -> Column:
    kinds = {_PREFIX + kind.value: kind for kind in ColumnType}
    name = pb.ColumnType.Name(message.type) if message.type in pb.ColumnType.values() else str(message.type)
    if name not in kinds:
        raise InvalidArgumentError(f"{field}.type", f"{name} is no column type")
    return Column(
        message.name,
        kinds[name],
        message.nullable,
        message.min if message.HasField("min") else None,
        message.max if message.HasField("max") else None,
        tuple(message.allowed),
        message.pattern,
    )


def contract_to(contract: Contract) -> pb.DataContract:
    """The contract as a message."""
    columns = []
    for column in contract.columns:
        message = pb.Column(
            name=column.name,
            type=pb.ColumnType.Value(_PREFIX + column.type.value),
            nullable=column.nullable,
            allowed=column.allowed,
            pattern=column.pattern,
        )
        if column.minimum is not None:
            message.min = column.minimum
        if column.maximum is not None:
            message.max = column.maximum
        columns.append(message)
    return pb.DataContract(
        name=contract.name,
        version=contract.version,
        columns=columns,
        event_id_column=contract.event_id_column,
        event_time_column=contract.event_time_column,
        key_columns=contract.key_columns,
    )


def contract_bytes(contract: Contract) -> bytes:
    """The contract as it is stored."""
    return contract_to(contract).SerializeToString(deterministic=True)


def contract_from_bytes(version: int, body: bytes) -> Contract:
    """A stored contract; it was validated when it was registered."""
    message = pb.DataContract.FromString(body)
    columns = tuple(_column(column, f"columns[{index}]") for index, column in enumerate(message.columns))
    return Contract(
        message.name, version, columns, message.event_id_column, message.event_time_column, tuple(message.key_columns)
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
    )


def reason_from(value: str, field: str) -> str:
    """A dead letter's reason; empty is every reason.

    Raises:
        InvalidArgumentError: no dead letter can have it.
    """
    if value and value not in REASONS:
        raise InvalidArgumentError(field, f"is none of {', '.join(REASONS)}")
    return value


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


def count_to(count: LetterCount) -> pb.DeadLetterCount:
    """A count as a message."""
    return pb.DeadLetterCount(contract=count.contract, reason=count.reason, count=count.count, replayed=count.replayed)


def table_to(state: TableState) -> pb.GetTableResponse:
    """A table's state as a message."""
    return pb.GetTableResponse(
        table=TableVersion(table=state.contract, version=state.version), url=state.url, rows=state.rows
    )
