"""Checks of request fields: what passes, what is refused, and that the field is named."""

import math
from datetime import UTC, datetime

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

SHA = "a" * 64


@pytest.mark.parametrize(
    ("call", "good"),
    [
        (check.name, "flight-delay_2"),
        (check.name, "a"),
        (check.table, "outcomes_lake"),
        (check.text, "Zürich ✈"),
        (check.optional_text, ""),
        (check.sha256, SHA),
        (check.semver, "1.0.0-rc.1+build.5"),
    ],
)
def test_good(call, good: str) -> None:
    assert call(good, "field") == good


@pytest.mark.parametrize(
    ("call", "bad"),
    [
        (check.name, ""),
        (check.name, "-a"),
        (check.name, "a" * 64),
        (check.name, "A"),
        (check.name, "a\n"),
        (check.table, "1a"),
        (check.table, "a-b"),
        (check.text, ""),
        (check.text, "a" * 5000),
        (check.text, "a\0b"),
        (check.optional_text, "\0"),
        (check.sha256, "A" * 64),
        (check.sha256, "a" * 63),
        (check.semver, "1.0"),
        (check.semver, "01.0.0"),
        (check.semver, "1.0.0-"),
        (check.semver, "1.0.0-01"),
        (check.semver, "1.0.0\n"),
        (check.semver, "1.0." + "1" * 200),
    ],
)
def test_bad_names_the_field(call, bad: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        call(bad, "request.field")
    assert caught.value.metadata["field"] == "request.field"


def test_precedence_of_semantic_versions() -> None:
    # The examples of https://semver.org, section 11.
    ordered = [
        "0.9.0", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1",
        "1.0.0", "1.0.1", "1.2.0", "1.10.0", "2.0.0",
    ]  # fmt: skip
    ordered_by_key = sorted(sorted(ordered), key=check.semver_key)
    assert ordered_by_key == ordered
    assert check.semver_key("1.0.0+a") == check.semver_key("1.0.0+b")
    with pytest.raises(ValueError, match="not a semantic version"):
        check.semver_key("v1")


@pytest.mark.parametrize(("value", "kept"), [(0, 100), (1, 1), (1000, 1000)])
def test_page_size(value: int, kept: int) -> None:
    assert check.page_size(value, "page_size") == kept


@pytest.mark.parametrize("value", [-1, 1001])
def test_bad_page_size(value: int) -> None:
    with pytest.raises(InvalidArgumentError):
        check.page_size(value, "page_size")


@given(st.text())
def test_page_token_is_a_number_or_refused(value: str) -> None:
    try:
        found = check.page_token(value, "page_token")
    except InvalidArgumentError:
        assert not (value.isascii() and value.isdigit() and len(value) <= 18)
    else:
        assert found == int(value or "0")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite(value: float) -> None:
    with pytest.raises(InvalidArgumentError):
        check.finite(value, "x")


def test_timestamp() -> None:
    moment = datetime(2013, 7, 1, tzinfo=UTC)
    good = Timestamp()
    good.FromDatetime(moment)
    assert check.timestamp(good, "at") == moment
    for bad in (Timestamp(seconds=1 << 60), Timestamp(seconds=-(1 << 60)), Timestamp(nanos=-5)):
        with pytest.raises(InvalidArgumentError):
            check.timestamp(bad, "at")
