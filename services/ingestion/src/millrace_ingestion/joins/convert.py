"""Joins between their protobuf messages and the domain."""

import math
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.ingestion.v1 import sources_pb2 as pb
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

from millrace_ingestion.joins.position import NEVER_US
from millrace_ingestion.joins.specs import ANY_AGE_US, JoinKey, JoinKind, JoinSpec
from millrace_ingestion.sources.specs import JoinProgress

MAX_KEYS = 8
MAX_BOUND_S = 366 * 86_400.0
MAX_WAIT_S = 86_400.0
_US = 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_KINDS = {
    pb.JOIN_KIND_INNER: JoinKind.INNER, pb.JOIN_KIND_LEFT: JoinKind.LEFT, pb.JOIN_KIND_AS_OF: JoinKind.AS_OF,
}  # fmt: skip
_OF_KIND = {
    "before_s": (JoinKind.INNER, JoinKind.LEFT),
    "after_s": (JoinKind.INNER, JoinKind.LEFT),
    "lateness_s": (JoinKind.LEFT,),
    "idle_s": (JoinKind.LEFT,),
    "max_age_s": (JoinKind.AS_OF,),
    "wait_s": (JoinKind.AS_OF,),
}


def join_from(message: pb.JoinSource, field: str) -> JoinSpec:
    """A join whose fields are right by themselves.

    Raises:
        InvalidArgumentError: naming the field.
    """
    if message.kind not in _KINDS:
        raise InvalidArgumentError(f"{field}.kind", "needs INNER, LEFT or AS_OF")
    kind = _KINDS[message.kind]
    for name, kinds in _OF_KIND.items():
        value = getattr(message, name)
        limit = MAX_WAIT_S if name in {"idle_s", "wait_s"} else MAX_BOUND_S
        if value and kind not in kinds:
            raise InvalidArgumentError(f"{field}.{name}", f"is for {' and '.join(one.value for one in kinds)}")
        if math.isnan(value) or not 0 <= value <= limit:
            raise InvalidArgumentError(f"{field}.{name}", f"must be 0 to {limit:.0f}")
    if not 1 <= len(message.keys) <= MAX_KEYS:
        raise InvalidArgumentError(f"{field}.keys", f"needs 1 to {MAX_KEYS} keys")
    keys = tuple(
        JoinKey(check.text(key.left, f"{field}.keys[{index}].left", limit=63), key.right or key.left)
        for index, key in enumerate(message.keys)
    )
    for names in ([key.left for key in keys], [key.right for key in keys]):
        if len(set(names)) < len(names):
            raise InvalidArgumentError(f"{field}.keys", "names a column twice")
    as_of = kind is JoinKind.AS_OF
    return JoinSpec(
        kind,
        check.table(message.left, f"{field}.left"),
        check.table(message.right, f"{field}.right"),
        keys,
        before_us=_us(message.max_age_s) or ANY_AGE_US if as_of else _us(message.before_s),
        after_us=_us(message.after_s),
        lateness_us=_us(message.lateness_s),
        idle_s=message.idle_s,
        wait_s=message.wait_s,
        right_prefix=check.optional_text(message.right_prefix, f"{field}.right_prefix", limit=63),
    )


def join_to(spec: JoinSpec) -> pb.JoinSource:
    """The message of a join."""
    kinds = {ours: theirs for theirs, ours in _KINDS.items()}
    message = pb.JoinSource(
        kind=kinds[spec.kind],
        left=spec.left,
        right=spec.right,
        keys=[pb.JoinKey(left=key.left, right=key.right) for key in spec.keys],
        after_s=spec.after_us / _US,
        lateness_s=spec.lateness_us / _US,
        idle_s=spec.idle_s,
        wait_s=spec.wait_s,
        right_prefix=spec.right_prefix,
    )
    if spec.kind is not JoinKind.AS_OF:
        message.before_s = spec.before_us / _US
    elif spec.before_us != ANY_AGE_US:
        message.max_age_s = spec.before_us / _US
    return message


def status_to(spec: JoinSpec, progress: JoinProgress) -> pb.JoinStatus:
    """The message of how far a join is."""
    status = pb.JoinStatus(matched=progress.matched, unmatched=progress.unmatched, late=progress.late)
    status.left.contract, status.right.contract = spec.left, spec.right
    at = progress.position
    if at is None:
        return status
    status.left.version, status.right.version = at.left_version, at.right_version
    status.left.newest_version, status.right.newest_version = progress.newest
    for stamp, us in (
        (status.left.event_time, at.left_high_us),
        (status.right.event_time, at.right_high_us),
        (status.settled, at.settled_us),
    ):
        if us != NEVER_US:
            _set(stamp, us)
    return status


def _set(stamp: Timestamp, us: int) -> None:
    stamp.FromDatetime(_EPOCH + timedelta(microseconds=us))


def _us(seconds: float) -> int:
    return round(seconds * _US)
