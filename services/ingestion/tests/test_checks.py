"""Conversions and checks of records, without a server: one case a rule."""

import datetime as dt
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_ingestion.arrow_records import check_table, read_stream
from millrace_ingestion.checks import Checked
from millrace_ingestion.contract_messages import contract_from
from millrace_ingestion.contracts import Column, ColumnType, Contract
from millrace_ingestion.hashing import hash_strings
from millrace_ingestion.ipc_bounds import decoded_size
from millrace_ingestion.json_records import JsonReader
from millrace_kit.errors import InvalidArgumentError, ResourceExhaustedError

from .harness import contract, ipc, lines, records, row

MIB = 1 << 20


def one_column(kind: ColumnType, **checks) -> Contract:
    column = Column("x", kind, **{"nullable": True, **checks})
    return Contract("t", 1, (Column("id", ColumnType.STRING), Column("at", ColumnType.TIMESTAMP), column), "id", "at")


def check_arrow(values: pa.Array, kind: ColumnType, **checks) -> Checked:
    table = pa.table({"id": [f"i{i}" for i in range(len(values))], "at": pa.array([0] * len(values)), "x": values})
    return check_table(one_column(kind, **checks), table, max_bytes=MIB)


def check_json(payload: bytes, message=None) -> Checked:
    return JsonReader(contract_from(message or contract(), "contract")).check(payload, max_rows=1000)


def reasons(checked: Checked) -> list[tuple[int, str, str]]:
    return [(reject.row, reject.failure.reason, reject.failure.column) for reject in checked.rejects]


US = pa.timestamp("us", "UTC")


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (pa.array(["a", None], pa.large_string()), ColumnType.STRING, ["a", None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ColumnType.STRING, ["a", "b", "a"]),
        (pa.array([1, None], pa.int8()), ColumnType.INT64, [1, None]),
        (pa.array([1, 2**63 - 1], pa.uint64()), ColumnType.INT64, [1, 2**63 - 1]),
        (pa.array([1.5], pa.float32()), ColumnType.DOUBLE, [1.5]),
        (pa.array([3, 2**53], pa.int64()), ColumnType.DOUBLE, [3.0, 2.0**53]),
        (pa.array([True, None]), ColumnType.BOOL, [True, None]),
        (pa.nulls(2), ColumnType.DOUBLE, [None, None]),
    ],
)
def test_arrow_conversions(values, kind, expected) -> None:
    checked = check_arrow(values, kind)
    assert reasons(checked) == []
    assert checked.table["x"].to_pylist() == expected


@pytest.mark.parametrize(
    ("values", "microseconds"),
    [
        (pa.array([1_500], pa.timestamp("ms")), 1_500_000),
        (pa.array([1_999], pa.timestamp("ns", "UTC")), 1),
        (pa.array([7], pa.timestamp("s", "America/New_York")), 7_000_000),
        (pa.array([5], pa.int64()), 5),
    ],
)
def test_arrow_timestamps_become_utc_microseconds(values, microseconds) -> None:
    checked = check_arrow(values, ColumnType.TIMESTAMP)
    assert checked.table["x"].type == US
    assert checked.table["x"].cast(pa.int64()).to_pylist() == [microseconds]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([1]), ColumnType.STRING),
        (pa.array(["1"]), ColumnType.INT64),
        (pa.array([1.0]), ColumnType.INT64),
        (pa.array([True]), ColumnType.INT64),
        (pa.array([2**63], pa.uint64()), ColumnType.INT64),
        (pa.array([2**53 + 1]), ColumnType.DOUBLE),
        (pa.array([1]), ColumnType.BOOL),
        (pa.array([2**62], pa.timestamp("s")), ColumnType.TIMESTAMP),
        (pa.array([dt.date(2013, 1, 1)]), ColumnType.TIMESTAMP),
        (pa.array([[1]]), ColumnType.DOUBLE),
    ],
)
def test_arrow_wrong_types_are_refused_per_record(values, kind) -> None:
    assert reasons(check_arrow(values, kind)) == [(0, "WRONG_TYPE", "x")]


def test_only_the_records_with_a_wrong_value_are_refused() -> None:
    checked = check_arrow(pa.array([1, 2**63, None], pa.uint64()), ColumnType.INT64)
    assert reasons(checked) == [(1, "WRONG_TYPE", "x")]
    assert checked.rows.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("values", "kind", "checks", "reason"),
    [
        (pa.array([1.0, None, 0.9]), ColumnType.DOUBLE, {"minimum": 1.0}, "OUT_OF_RANGE"),
        (pa.array([1.0, None, float("nan")]), ColumnType.DOUBLE, {"maximum": 5.0}, "OUT_OF_RANGE"),
        (pa.array([2**53, None, 2**53 + 1]), ColumnType.INT64, {"maximum": float(2**53)}, "OUT_OF_RANGE"),
        (pa.array([1, None, 0]), ColumnType.INT64, {"minimum": 0.5}, "OUT_OF_RANGE"),
        (pa.array(["a", None, "c"]), ColumnType.STRING, {"allowed": ("a", "b")}, "NOT_ALLOWED_VALUE"),
        (pa.array(["ab", None, "abc"]), ColumnType.STRING, {"pattern": "a.|b"}, "PATTERN_MISMATCH"),
        (pa.array(["ab", None, "ab\n"]), ColumnType.STRING, {"pattern": "ab"}, "PATTERN_MISMATCH"),
        (pa.array([0, None, 2**62], US), ColumnType.TIMESTAMP, {}, "OUT_OF_RANGE"),
    ],
)
def test_value_checks_pass_null_and_refuse_the_last(values, kind, checks, reason) -> None:
    checked = check_arrow(values, kind, **checks)
    assert reasons(checked) == [(2, reason, "x")]
    assert checked.table.num_rows == 2


def test_bounds_outside_int64_refuse_all_or_none() -> None:
    assert reasons(check_arrow(pa.array([2**63 - 1, None]), ColumnType.INT64, maximum=1e30)) == []
    assert reasons(check_arrow(pa.array([2**63 - 1, None]), ColumnType.INT64, minimum=1e30)) == [
        (0, "OUT_OF_RANGE", "x")
    ]


def test_the_first_failure_in_column_order_counts() -> None:
    bad = records(0, 4).to_pylist()
    bad[0] |= {"carrier": "?", "delay": 1e6}
    bad[1] |= {"event_id": "", "carrier": "?"}
    bad[2] |= {"carrier": None}
    checked = check_table(
        contract_from(contract(), "c"), pa.Table.from_pylist(bad, records(0, 1).schema), max_bytes=MIB
    )
    assert reasons(checked) == [
        (0, "PATTERN_MISMATCH", "carrier"),
        (1, "MISSING_EVENT_ID", "event_id"),
        (2, "NULL_NOT_ALLOWED", "carrier"),
    ]
    assert checked.table["event_id"].to_pylist() == ["e3"]
    assert '"carrier":"?"' in checked.rejects[0].record_json


def test_a_missing_column() -> None:
    agreed = contract_from(contract(), "c")
    assert reasons(check_table(agreed, records(0, 2).drop(["delay"]), max_bytes=MIB)) == []
    checked = check_table(agreed, records(0, 2).drop(["carrier"]), max_bytes=MIB)
    assert reasons(checked) == [(0, "MISSING_COLUMN", "carrier"), (1, "MISSING_COLUMN", "carrier")]
    checked = check_table(agreed, records(0, 1).drop(["event_id"]), max_bytes=MIB)
    assert reasons(checked) == [(0, "MISSING_EVENT_ID", "event_id")]


@pytest.mark.parametrize(
    ("record", "reason", "column"),
    [
        ("{", "MALFORMED_JSON", ""),
        ("[1]", "MALFORMED_JSON", ""),
        ('{"event_id": "\xff"', "MALFORMED_JSON", ""),
        (row("a", seats=1.5), "WRONG_TYPE", "seats"),
        (row("a", seats=2**63), "WRONG_TYPE", "seats"),
        (row("a", seats="1"), "WRONG_TYPE", "seats"),
        (row("a", seats=True), "WRONG_TYPE", "seats"),
        (row("a", delay="1.5"), "WRONG_TYPE", "delay"),
        (row("a", at="yesterday"), "WRONG_TYPE", "at"),
        (row("a", at=None), "NULL_NOT_ALLOWED", "at"),
        (row(""), "MISSING_EVENT_ID", "event_id"),
        (row("x" * 513), "OUT_OF_RANGE", "event_id"),
        ({"event_id": "a", "at": 1}, "MISSING_COLUMN", "carrier"),
        ({"at": 1, "carrier": "UA"}, "MISSING_EVENT_ID", "event_id"),
        (row("a", delay="NaN"), "OUT_OF_RANGE", "delay"),
        (row("a", seats=0), "OUT_OF_RANGE", "seats"),
    ],
)
def test_a_bad_json_record_beside_good_ones(record, reason, column) -> None:
    checked = check_json(lines(row("good"), record, row("better")))
    assert reasons(checked) == [(1, reason, column)]
    assert checked.table["event_id"].to_pylist() == ["good", "better"]
    assert checked.rows.tolist() == [0, 2]


def test_json_takes_named_floats_naive_times_and_blank_lines() -> None:
    message = contract(delay={"type": 3, "nullable": True, "min": None, "max": None})
    checked = check_json(
        b"\n" + lines(row("a", delay="NaN", at="2013-01-01T00:00:00")) + b"\r\n\n" + lines(row("b")), message
    )
    assert reasons(checked) == []
    assert np.isnan(checked.table["delay"][0].as_py())
    assert checked.table["at"].to_pylist() == [dt.datetime(2013, 1, 1, tzinfo=dt.UTC)] * 2


def test_too_many_json_records() -> None:
    with pytest.raises(ResourceExhaustedError):
        JsonReader(contract_from(contract(), "c")).check(lines(row("a"), row("b"), row("c")), max_rows=2)


def test_dead_letters_of_arrow_records_can_be_read_as_json_again() -> None:
    table = records(0, 1).set_column(3, "delay", pa.array([float("inf")]))
    refused = check_table(contract_from(contract(), "c"), table, max_bytes=MIB).rejects[0].record_json
    looser = contract(delay={"type": 3, "nullable": True, "min": None, "max": None})
    checked = check_json(refused.encode(), looser)
    assert checked.table.to_pylist() == table.to_pylist()


def test_murmur3_has_the_reference_values() -> None:
    # Computed with the reference implementation's binding (mmh3.hash64, x64, seed 0, unsigned).
    expected = {
        "flight-1": (6981368328115872734, 15533850153338423563),
        "": (0, 0),
        "0123456789abcdef0123": (9243362812931687434, 10271980103073960071),
    }
    high, low = hash_strings(pa.array(["cut off", *expected]).slice(1))
    assert list(zip(high.tolist(), low.tolist(), strict=True)) == list(expected.values())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_no_arrow_stream(payload: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        read_stream(payload, max_rows=100, max_bytes=MIB)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from([None, "zstd", "lz4"]))
def test_a_damaged_arrow_stream_is_read_or_refused(place: int, value: int, compression: str | None) -> None:
    payload = bytearray(ipc(records(0, 20), options=pa.ipc.IpcWriteOptions(compression=compression)))
    payload[place % len(payload)] = value
    try:
        table = read_stream(bytes(payload), max_rows=100, max_bytes=MIB)
    except (InvalidArgumentError, ResourceExhaustedError):
        return
    check_table(contract_from(contract(), "c"), table, max_bytes=MIB)


def test_compressed_bombs_are_refused_before_they_are_decompressed() -> None:
    bomb = ipc(pa.table({"x": np.zeros(1_000_000)}), options=pa.ipc.IpcWriteOptions(compression="zstd"))
    assert len(bomb) < 20_000
    assert decoded_size(bomb) >= 8_000_000
    with pytest.raises(ResourceExhaustedError):
        read_stream(bomb, max_rows=10_000_000, max_bytes=MIB)


def test_dictionary_bombs_are_refused() -> None:
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000, np.int8)), pa.array(["x" * 100_000]))
    table = pa.table({"event_id": values})
    with pytest.raises(ResourceExhaustedError):
        check_table(contract_from(contract(), "c"), table, max_bytes=MIB)


def test_a_row_count_without_rows_is_refused() -> None:
    huge = pa.table({"x": pa.nulls(10_000_000)})
    with pytest.raises(ResourceExhaustedError):
        read_stream(ipc(huge), max_rows=100_000, max_bytes=MIB)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_lines_are_dead_letters(payload: bytes) -> None:
    checked = check_json(payload)
    assert checked.table.num_rows == 0
    assert {reason for _row, reason, _column in reasons(checked)} <= {"MALFORMED_JSON", "MISSING_EVENT_ID"}


def test_flatbuffer_reader_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="metadata"):
        decoded_size(b"\xff\xff\xff\xff" + struct.pack("<i", 8) + b"\xff" * 8)
