"""Dead letters between the domain and the rows of their table."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Row

from millrace_ingestion.checks import Reject
from millrace_ingestion.models import Entry, Group, Letter
from millrace_ingestion.origins import Headers, Origin

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_HEADERS = msgspec.msgpack.Decoder(list[tuple[str, bytes | None]])


def letter_rows(group: Group, entry: Entry, now_us: int) -> Sequence[dict[str, object]]:
    """A row for each new dead letter of a batch; `now_us` is when it was refused."""
    return [
        {
            "group_id": group.id,
            "contract": group.contract,
            "source": entry.source,
            "offset": entry.offset,
            "reason": reject.failure.reason,
            "column": reject.failure.column,
            "detail": reject.failure.detail,
            "record_json": reject.record_json,
            "received_at_us": now_us,
            "stage": reject.stage,
            "exception": reject.exception,
            **_origin_values(reject),
        }
        for reject in entry.rejects
    ]


def _origin_values(reject: Reject) -> dict[str, object]:
    origin = reject.origin
    return {
        "origin_topic": origin.topic if origin else None,
        "origin_partition": origin.partition if origin else None,
        "origin_offset": origin.offset if origin else None,
        "origin_timestamp_ms": origin.timestamp_ms if origin else None,
        "origin_key": origin.key if origin else None,
        "origin_value": origin.value if origin else None,
        "origin_headers": msgspec.msgpack.encode(list(origin.headers)) if origin and origin.headers else None,
    }


def letter_of(row: Row[Any]) -> Letter:
    """A dead letter from its row."""
    return Letter(
        row.id,
        row.contract,
        row.source,
        row.offset,
        row.reason,
        row.column,
        row.detail,
        row.record_json,
        _EPOCH + row.received_at_us * _MICROSECOND,
        row.replay_group_id is not None,
        _origin_of(row),
        row.stage,
        row.exception,
    )


def _origin_of(row: Row[Any]) -> Origin | None:
    if row.origin_topic is None:
        return None
    headers: Headers = _HEADERS.decode(row.origin_headers) if row.origin_headers is not None else ()
    return Origin(
        row.origin_topic,
        row.origin_partition,
        row.origin_offset,
        row.origin_timestamp_ms,
        None if row.origin_key is None else bytes(row.origin_key),
        None if row.origin_value is None else bytes(row.origin_value),
        headers,
    )
