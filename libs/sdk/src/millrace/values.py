"""Python values as protobuf `Value`s and back."""

from collections.abc import Mapping
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1.common_pb2 import TimeRange, Value

Scalar = str | int | float | bool | datetime


def to_value(scalar: Scalar) -> Value:
    """A `Value` of the scalar's own kind; a naive datetime is refused."""
    match scalar:
        case bool():
            return Value(bool_value=scalar)
        case int():
            return Value(int64_value=scalar)
        case float():
            return Value(double_value=scalar)
        case str():
            return Value(string_value=scalar)
        case datetime():
            return Value(timestamp_value=to_timestamp(scalar))


def from_value(value: Value) -> Scalar | None:
    """The scalar of a `Value`; None where it is unset."""
    kind = value.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "timestamp_value":
        return value.timestamp_value.ToDatetime(tzinfo=UTC)
    scalar: Scalar = getattr(value, kind)
    return scalar


def to_values(scalars: Mapping[str, Scalar | None]) -> dict[str, Value]:
    """Each scalar as a `Value`; what is None is left out, which services read as not known."""
    return {name: to_value(scalar) for name, scalar in scalars.items() if scalar is not None}


def to_timestamp(instant: datetime) -> Timestamp:
    """A protobuf `Timestamp`.

    Raises:
        ValueError: `instant` has no time zone.
    """
    if instant.tzinfo is None:
        raise ValueError("a datetime needs a time zone")
    stamp = Timestamp()
    stamp.FromDatetime(instant.astimezone(UTC))
    return stamp


def to_range(start: datetime | None, end: datetime | None) -> TimeRange:
    """A half-open range; None leaves that side open."""
    made = TimeRange()
    if start is not None:
        made.start.CopyFrom(to_timestamp(start))
    if end is not None:
        made.end.CopyFrom(to_timestamp(end))
    return made
