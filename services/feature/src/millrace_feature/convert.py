"""Between messages and domain values."""

import functools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import feature_pb2
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

from millrace_feature.float_parts import VectorTable
from millrace_feature.plan import Definitions, ServicePlan, ValueType
from millrace_feature.rows import Scalar
from millrace_feature.serving import Entity, Vector, Vectors, ViewAges
from millrace_feature.store import Followed
from millrace_feature.training import Labels
from millrace_feature.wire_format import sized, varint
from millrace_feature.worker import to_us

MAX_ROWS = 1000
MAX_VERSION = (1 << 63) - 1
_ACCEPTED: Mapping[ValueType, frozenset[str]] = {
    "string": frozenset({"string_value"}),
    "int64": frozenset({"int64_value"}),
    "double": frozenset({"double_value", "int64_value"}),
    "bool": frozenset({"bool_value"}),
    "timestamp": frozenset({"timestamp_value"}),
}


class RowReader:
    """Reads the entity rows of one feature service."""

    def __init__(self, plan: ServicePlan, definitions: Definitions) -> None:
        kinds = dict(definitions.key_types)
        fields: dict[str, list[ValueType]] = {key: [kinds[key]] for key in plan.join_keys}
        for name, kind in plan.request_fields:
            fields.setdefault(name, []).append(kind)
        self._keys = frozenset(plan.join_keys)
        self._fields = [
            (name, frozenset.intersection(*(_ACCEPTED[kind] for kind in accepted)), kind_names)
            for name, accepted in fields.items()
            for kind_names in [" and ".join(dict.fromkeys(accepted))]
        ]

    def read(self, rows: Sequence[feature_pb2.EntityRow], field: str = "rows") -> list[Entity]:
        """Values by name; a join key that is missing is None, a request field must be there (but may be an unset Value).

        Args:
            rows: of the request.
            field: the request's field they are in.
        """
        return [self._row(row.values, field, i) for i, row in enumerate(rows)]

    def _row(self, values: Mapping[str, common_pb2.Value], field: str, number: int) -> Entity:
        out: dict[str, Any] = {}
        for name, accepted, kinds in self._fields:
            if name not in values:
                if name not in self._keys:
                    raise InvalidArgumentError(f'{field}[{number}].values["{name}"]', f"is needed ({kinds})")
                out[name] = None
                continue
            value = values[name]
            kind = value.WhichOneof("kind")
            if kind is None:
                out[name] = None
            elif kind not in accepted:
                raise InvalidArgumentError(f'{field}[{number}].values["{name}"]', f"must be {kinds}, not {kind}")
            elif kind == "timestamp_value":
                out[name] = check.timestamp(value.timestamp_value, f'{field}[{number}].values["{name}"]')
            else:
                found = getattr(value, kind)
                out[name] = None if isinstance(found, float) and math.isnan(found) else found
        return out


def to_value(scalar: Scalar) -> common_pb2.Value:
    """A row's value as a message, unset where it is missing; embeddings are none."""
    match scalar:
        case bool():
            return common_pb2.Value(bool_value=scalar)
        case int():
            return common_pb2.Value(int64_value=scalar)
        case float():
            return common_pb2.Value(double_value=scalar)
        case str():
            return common_pb2.Value(string_value=scalar)
        case datetime():
            return common_pb2.Value(timestamp_value=to_timestamp(to_us(scalar)))
    return common_pb2.Value()


@dataclass(frozen=True, slots=True)
class Aged:
    """How old the values of each view are."""

    views: tuple[str, ...]
    ages_ms: ViewAges


def rows_in_bounds(rows: Sequence[feature_pb2.EntityRow]) -> None:
    """Raises InvalidArgumentError unless there are 1 to 1000 rows."""
    if not 1 <= len(rows) <= MAX_ROWS:
        raise InvalidArgumentError("rows", f"needs 1 to {MAX_ROWS} rows, not {len(rows)}")


def to_answer(
    features: tuple[str, ...], vectors: Vectors, digest: str, cache_age_ms: int, aged: Aged | None = None
) -> bytes:
    """The bytes of a `GetOnlineFeaturesResponse`, written without making one: that costs as much as the read."""
    out = [_names(features)]
    if aged is not None:
        out += _aged_rows(vectors, len(features), aged.ages_ms)
        out.append(_view_names(aged.views))
    else:
        out += [_table(vectors)] if isinstance(vectors, VectorTable) else _rows(vectors, len(features))
    out.append(sized(b"\x1a", digest.encode()))
    if cache_age_ms:
        out.append(b"\x20" + varint(cache_age_ms))
    return b"".join(out)


def _rows(vectors: Sequence[Vector], count: int) -> list[bytes]:
    out = []
    pack = struct.Struct(f"<{count}d").pack
    head = b"\x0a" + varint(8 * count)
    marks = b"\x12" + varint(count)
    for vector in vectors:
        content = head + pack(*vector.values) + marks + bytes(vector.statuses)
        if vector.max_age_ms:
            content += b"\x18" + varint(vector.max_age_ms)
        out.append(sized(b"\x12", content))
    return out


def _aged_rows(vectors: Vectors, count: int, ages_ms: ViewAges) -> list[bytes]:
    out = []
    head, marks = b"\x0a" + varint(8 * count), b"\x12" + varint(count)
    if isinstance(vectors, VectorTable):
        rows = zip(vectors.values.astype("<f8", copy=False), vectors.marks, strict=True)
        contents = [head + values.tobytes() + marks + statuses.tobytes() for values, statuses in rows]
        oldest = [vectors.max_age_ms] * len(contents)
    else:
        pack = struct.Struct(f"<{count}d").pack
        contents = [head + pack(*vector.values) + marks + bytes(vector.statuses) for vector in vectors]
        oldest = [vector.max_age_ms for vector in vectors]
    for content, age_ms, ages in zip(contents, oldest, ages_ms, strict=True):
        tail = b"\x18" + varint(age_ms) if age_ms else b""
        # As sint64: an age that may be -1 takes one byte then, not ten.
        by_view = b"".join([varint(2 * age if age >= 0 else -2 * age - 1) for age in ages])
        out.append(sized(b"\x12", content + tail + sized(b"\x22", by_view)))
    return out


@functools.lru_cache(maxsize=1024)
def _view_names(views: tuple[str, ...]) -> bytes:
    return feature_pb2.GetOnlineFeaturesResponse(view_names=views).SerializeToString()


def _table(table: VectorTable) -> bytes:
    """All vectors at once: every one has the same length."""
    rows, count = table.values.shape
    head, marks = b"\x0a" + varint(8 * count), b"\x12" + varint(count)
    tail = b"\x18" + varint(table.max_age_ms) if table.max_age_ms else b""
    head = b"\x12" + varint(len(head) + 9 * count + len(marks) + len(tail)) + head
    pieces = head, np.ascontiguousarray(table.values, "<f8").view(np.uint8), marks, table.marks, tail
    out = [np.broadcast_to(np.frombuffer(p, np.uint8), (rows, len(p))) if isinstance(p, bytes) else p for p in pieces]
    return np.concatenate(out, axis=1).tobytes()


@functools.lru_cache(maxsize=1024)
def _names(features: tuple[str, ...]) -> bytes:
    return feature_pb2.GetOnlineFeaturesResponse(feature_names=features).SerializeToString()


def to_services(definitions: Definitions) -> list[feature_pb2.FeatureServiceInfo]:
    """Compiled services as messages."""
    return [
        feature_pb2.FeatureServiceInfo(
            name=plan.name,
            features=plan.features,
            join_keys=plan.join_keys,
            request_fields=[name for name, _kind in plan.request_fields],
        )
        for plan in definitions.services
    ]


def to_timestamp(instant_us: int) -> Timestamp:
    """Microseconds since the epoch as a message."""
    return Timestamp(seconds=instant_us // 1_000_000, nanos=instant_us % 1_000_000 * 1000)


def optional_us(message: Any, field: str, path: str) -> int | None:
    """A Timestamp field in microseconds; None when it is not set."""
    if not message.HasField(field):
        return None
    return to_us(check.timestamp(getattr(message, field), path))


def labels_of(request: feature_pb2.BuildTrainingSetRequest) -> Labels:
    """The rows and label a request names, checked."""
    if request.feature_service or not request.features:
        check.text(request.feature_service, "feature_service", limit=256)
    if request.definitions_hash:
        check.sha256(request.definitions_hash, "definitions_hash")
    labels = Labels(
        entity_contract=check.table(request.entity_contract, "entity_contract"),
        label_contract=check.table(request.label_contract, "label_contract"),
        join_column=check.text(request.join_column, "join_column", limit=256),
        label_column=check.text(request.label_column, "label_column", limit=256),
        start_us=optional_us(request.time_range, "start", "time_range.start"),
        end_us=optional_us(request.time_range, "end", "time_range.end"),
        known_at_us=optional_us(request, "known_at", "known_at"),
    )
    if labels.start_us is not None and labels.end_us is not None and labels.start_us >= labels.end_us:
        raise InvalidArgumentError("time_range", "start must lie before end")
    if len({"event_time", labels.join_column, labels.label_column}) != 3:
        raise InvalidArgumentError("label_column", "event_time, join_column and label_column must be three names")
    return labels


def versions_of(request: feature_pb2.BuildTrainingSetRequest, tables: Sequence[str]) -> dict[str, int]:
    """The snapshots a request pins, checked against the tables the build reads."""
    versions: dict[str, int] = {}
    for i, item in enumerate(request.table_versions):
        if item.table not in tables:
            raise InvalidArgumentError(f"table_versions[{i}].table", f"is none of the tables read: {', '.join(tables)}")
        if item.table in versions:
            raise InvalidArgumentError(f"table_versions[{i}].table", "is named twice")
        if item.version < 0:
            raise InvalidArgumentError(f"table_versions[{i}].version", "must not be negative")
        versions[item.table] = item.version
    return versions


def to_progress(contract: str, followed: Followed, next_offset: int, end_offset: int) -> feature_pb2.ContractProgress:
    """Progress of one contract as a message."""
    watermark = to_timestamp(followed.watermark_us) if followed.watermark_us is not None else None
    return feature_pb2.ContractProgress(
        contract=contract, records=followed.records, watermark=watermark, next_offset=next_offset, end_offset=end_offset
    )


def now_timestamp(now: datetime) -> Timestamp:
    """A wall-clock instant as a message."""
    return to_timestamp(to_us(now.astimezone(UTC)))
