"""Checks of request fields: each raises `InvalidArgumentError` naming the field, and returns the good value."""

import math
import re
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from millrace_kit.errors import InvalidArgumentError

MAX_TEXT = 4096
_NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?")
_TABLE = re.compile(r"[a-z][a-z0-9_]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Semantic Versioning 2.0.0, https://semver.org, its own suggested expression.
_SEMVER = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?"
    r"(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?"
)
MAX_VERSION = 128


def name(value: str, field: str) -> str:
    """A DNS-label-like name: lower-case letters, digits, `-` and `_`, 1 to 63 characters."""
    if not _NAME.fullmatch(value):
        raise InvalidArgumentError(
            field, "needs 1 to 63 lower-case letters, digits, '-' or '_', starting and ending with a letter or digit"
        )
    return value


def table(value: str, field: str) -> str:
    """A contract's name: lower-case letters, digits and `_`, starting with a letter, 1 to 63 characters."""
    if not _TABLE.fullmatch(value):
        raise InvalidArgumentError(field, "needs 1 to 63 lower-case letters, digits or '_', starting with a letter")
    return value


def text(value: str, field: str, *, limit: int = MAX_TEXT) -> str:
    """A text of 1 to `limit` characters without U+0000, which PostgreSQL cannot keep."""
    if not value:
        raise InvalidArgumentError(field, "must not be empty")
    return optional_text(value, field, limit=limit)


def optional_text(value: str, field: str, *, limit: int = MAX_TEXT) -> str:
    """A text of at most `limit` characters without U+0000; it may be empty."""
    if len(value) > limit:
        raise InvalidArgumentError(field, f"is longer than {limit} characters")
    if "\0" in value:
        raise InvalidArgumentError(field, "must not contain the character U+0000")
    return value


def sha256(value: str, field: str) -> str:
    """A lower-case hex SHA-256."""
    if not _SHA256.fullmatch(value):
        raise InvalidArgumentError(field, "needs 64 lower-case hex digits (SHA-256)")
    return value


def semver(value: str, field: str) -> str:
    """A semantic version."""
    if len(value) > MAX_VERSION or not _SEMVER.fullmatch(value):
        raise InvalidArgumentError(field, "needs a semantic version like 1.4.0")
    return value


def semver_key(version: str) -> tuple[int, int, int, int, tuple[tuple[int, int, str], ...]]:
    """Sort key with the precedence of Semantic Versioning 2.0.0 (section 11); build metadata does not count."""
    match = _SEMVER.fullmatch(version)
    if match is None:
        raise ValueError(f"not a semantic version: {version!r}")
    major, minor, patch, pre = int(match[1]), int(match[2]), int(match[3]), match[4]
    parts = tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in pre.split(".")) if pre else ()
    return major, minor, patch, 0 if pre else 1, parts


def page_size(value: int, field: str, *, default: int = 100, limit: int = 1000) -> int:
    """A page size: 0 takes the default."""
    if value < 0 or value > limit:
        raise InvalidArgumentError(field, f"must be 0 to {limit}")
    return value or default


def page_token(value: str, field: str) -> int:
    """The last id of the page before; empty is 0."""
    if not value:
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise InvalidArgumentError(field, "is not a token of an earlier answer")
    return int(value)


def finite(value: float, field: str) -> float:
    """A number that is neither NaN nor infinite."""
    if not math.isfinite(value):
        raise InvalidArgumentError(field, "must be a finite number")
    return value


def timestamp(value: Timestamp, field: str) -> datetime:
    """A `Timestamp` inside years 1 to 9999 as an aware UTC datetime."""
    try:
        return value.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InvalidArgumentError(field, "is outside years 1 to 9999") from None
