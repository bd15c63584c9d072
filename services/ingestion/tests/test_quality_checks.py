"""Checks of lengths, sets, copies, freshness, pairs of columns and whole batches, and what each policy does."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_ingestion.arrow_records import check_table
from millrace_ingestion.checks import Arrival, Checked
from millrace_ingestion.contract_messages import contract_bytes, contract_from, contract_from_bytes
from millrace_ingestion.json_records import JsonReader
from millrace_kit.errors import InvalidArgumentError

from .harness import Client, contract, lines, records, row, serving

DOUBLE, INT64, STRING, TIMESTAMP = 3, 2, 1, 5
QUARANTINE, WARN = pb.CHECK_POLICY_QUARANTINE, pb.CHECK_POLICY_WARN
NOW = int(datetime(2013, 1, 2, tzinfo=UTC).timestamp()) * 1_000_000
ARRIVED = Arrival(NOW)


def check(rows: list[dict], *, arrival: Arrival = ARRIVED, rules=(), **changes) -> Checked:
    """Rows through JSON and through Arrow; both must judge alike."""
    message = contract(**changes)
    for rule in rules:
        (message.comparisons if isinstance(rule, pb.Comparison) else message.expectations).append(rule)
    known = contract_from(message, "contract")
    json = JsonReader(known).check(lines(*rows), max_rows=1000, arrival=arrival)
    arrow = check_table(known, pa.Table.from_pylist(rows_for_arrow(rows)), max_bytes=1 << 20, arrival=arrival)
    assert reasons(json) == reasons(arrow)
    assert set(json.findings) == set(arrow.findings)
    assert json.held == arrow.held
    return json


def rows_for_arrow(rows: list[dict]) -> list[dict]:
    return [{**r, "at": datetime.fromisoformat(r["at"])} if isinstance(r["at"], str) else r for r in rows]


def reasons(checked: Checked) -> list[tuple[int, str, str]]:
    return [(reject.row, reject.failure.reason, reject.failure.column) for reject in checked.rejects]


def test_lengths_count_characters() -> None:
    rows = [row("a", carrier=value) for value in ("", "éé", "ééé", "abcd")]
    found = check(rows, carrier={"pattern": "", "min_length": 1, "max_length": 3})
    assert reasons(found) == [(0, "WRONG_LENGTH", "carrier"), (3, "WRONG_LENGTH", "carrier")]


def test_sets_of_numbers() -> None:
    rows = [row("a", seats=value) for value in (1, 2, None, 2**62)]
    assert reasons(check(rows, seats={"allowed_numbers": [1, 2**62]})) == [(1, "NOT_ALLOWED_VALUE", "seats")]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(1, 4)), max_size=12))
def test_only_the_first_copy_is_unique(values: list[int | None]) -> None:
    found = check([row(f"e{i}", seats=value) for i, value in enumerate(values)] or [row("x")], seats={"unique": True})
    seen: set[int] = set()
    expected = []
    for place, value in enumerate(values):
        if value in seen:
            expected.append((place, "NOT_UNIQUE", "seats"))
        if value is not None:
            seen.add(value)
    assert reasons(found) == expected


def test_freshness_is_against_the_arrival() -> None:
    rows = [
        row("a", at=at)
        for at in ("2013-01-01T00:00:00+00:00", "2013-01-02T00:00:10+00:00", "2013-01-02T00:00:11+00:00")
    ]
    changes = {"at": {"type": TIMESTAMP, "max_age_s": 86400, "max_ahead_s": 10}}
    assert reasons(check(rows, **changes)) == [(2, "NOT_FRESH", "at")]
    assert reasons(check(rows, arrival=Arrival(NOW + 1), **changes)) == [(0, "NOT_FRESH", "at"), (2, "NOT_FRESH", "at")]
    each = np.array([NOW, NOW, NOW + 1_000_000])
    assert reasons(check(rows, arrival=Arrival(each, as_sent=False), **changes)) == []
    assert reasons(check(rows, arrival=Arrival(), **changes)) == []


def test_pairs_of_columns() -> None:
    rule = pb.Comparison(name="late", left="delay", operator=">=", column="seats")
    rows = [row("a", delay=d, seats=s) for d, s in ((2.0, 2), (1.9, 2), (None, 2), (3.0, None))]
    assert reasons(check(rows, rules=[rule])) == [(1, "COMPARISON_FAILED", "late")]
    number = pb.Comparison(name="big", left="seats", operator="!=", number=2)
    assert [r[0] for r in reasons(check(rows, rules=[number]))] == [0, 1, 2]


@pytest.mark.parametrize(
    ("expectation", "problem"),
    [
        ({"statistic": "ROW_COUNT", "min": 5}, "row_count() of the batch is 4"),
        ({"statistic": "ROW_COUNT", "max": 4}, ""),
        ({"statistic": "NULL_RATE", "column": "delay", "max": 0.2}, "null_rate(delay) of the batch is 0.25"),
        ({"statistic": "MEAN", "column": "delay", "max": 1}, "mean(delay) of the batch is 2"),
        ({"statistic": "MIN", "column": "delay", "min": 1}, ""),
        ({"statistic": "MAX", "column": "delay", "max": 2.5}, "max(delay) of the batch is 3"),
        ({"statistic": "SUM", "column": "delay", "min": 6, "max": 6}, ""),
        ({"statistic": "STDDEV", "column": "delay", "max": 0.5}, "stddev(delay) of the batch is 0.816497"),
        ({"statistic": "QUANTILE", "column": "delay", "quantile": 0.75, "max": 2}, "quantile(delay, 0.75) of the batch is 2.5"),
        ({"statistic": "DISTINCT", "column": "carrier", "min": 2}, "distinct(carrier) of the batch is 1"),
        ({"statistic": "DISTINCT", "column": "carrier", "min": 2, "min_rows": 5}, ""),
    ],
)  # fmt: skip
def test_expectations_of_a_batch(expectation: dict, problem: str) -> None:
    rows = [row(f"e{i}", delay=delay) for i, delay in enumerate((1.0, 2.0, 3.0, None))]
    given_ = {**expectation, "statistic": f"STATISTIC_{expectation['statistic']}"}
    found = check(rows, rules=[pb.Expectation(name="rule", **given_)])
    assert [reject.failure.reason for reject in found.rejects] == ["EXPECTATION_FAILED"] * (4 if problem else 0)
    assert all(problem in reject.failure.detail for reject in found.rejects)
    # A replay judges records, not batches.
    assert not check(rows, arrival=Arrival(NOW, as_sent=False), rules=[pb.Expectation(name="rule", **given_)]).rejects


def test_a_null_rate_of_the_column() -> None:
    rows = [row(f"e{i}", delay=None if i else 1.0) for i in range(4)]
    assert not check(rows, delay={"max_null_rate": 0.75}).rejects
    assert len(check(rows, delay={"max_null_rate": 0.7}).rejects) == 4
    warned = check(rows, delay={"max_null_rate": 0.7, "policies": {"null_rate": WARN}})
    assert (len(warned.rejects), warned.held, warned.table.num_rows) == (0, None, 4)
    assert [(f.column, f.check, f.policy.value) for f in warned.findings] == [("delay", "null_rate", "WARN")]


def test_policies_of_one_column() -> None:
    rows = [row("a", delay=5000), row("b"), row("c", carrier="?")]
    held = check(rows, delay={"policies": {"range": QUARANTINE}})
    assert held.held is not None
    assert (held.held.reason, held.table.num_rows, reasons(held)) == (
        "OUT_OF_RANGE", 2, [(2, "PATTERN_MISMATCH", "carrier")]
    )  # fmt: skip
    assert {(f.column, f.check, f.policy.value, f.count) for f in held.findings} == {
        ("delay", "range", "QUARANTINE", 1), ("carrier", "pattern_mismatch", "REJECT", 1)
    }  # fmt: skip


def test_every_field_of_a_contract_is_stored() -> None:
    message = contract(
        carrier={
            "min_length": 1,
            "max_length": 0x7FFF,
            "unique": True,
            "policies": {"pattern": WARN, "length": QUARANTINE},
        },
        delay={"max_null_rate": 0.5},
        seats={"allowed_numbers": [1, 2]},
        at={"max_age_s": 1.5, "max_ahead_s": 0},
    )
    message.compatibility = pb.COMPATIBILITY_FULL_TRANSITIVE
    message.comparisons.add(name="c", left="delay", operator="<", column="seats", policy=WARN)
    message.expectations.add(name="e", statistic=8, column="delay", quantile=0.5, max=3, min_rows=9, policy=QUARANTINE)
    known = contract_from(message, "contract")
    assert contract_from_bytes(0, contract_bytes(known)) == known
    assert hash(known)


@pytest.mark.parametrize(
    ("field", "changes", "rules"),
    [
        ("contract.name", {"name": "a__quarantine"}, []),
        ("contract.columns[2].policies", {"carrier": {"policies": {"type": WARN}}}, []),
        ("contract.columns[4].min_length", {"seats": {"min_length": 1}}, []),
        ("contract.columns[2].min_length", {"carrier": {"min_length": 2, "max_length": 1}}, []),
        ("contract.columns[2].allowed_numbers", {"carrier": {"allowed_numbers": [1]}}, []),
        ("contract.columns[2].max_null_rate", {"carrier": {"max_null_rate": 0.1}}, []),
        ("contract.columns[3].max_null_rate", {"delay": {"max_null_rate": 1.1}}, []),
        ("contract.columns[1].max_age_s", {"at": {"max_age_s": -1}}, []),
        ("contract.columns[3].max_age_s", {"delay": {"max_age_s": 1}}, []),
        ("contract.comparisons[0].left", {}, [pb.Comparison(name="c", left="x", operator="<", number=1)]),
        ("contract.comparisons[0].operator", {}, [pb.Comparison(name="c", left="seats", operator="=", number=1)]),
        ("contract.comparisons[0].right", {}, [pb.Comparison(name="c", left="seats", operator="<")]),
        ("contract.comparisons[0].column", {}, [pb.Comparison(name="c", left="seats", operator="<", column="at")]),
        ("contract.comparisons[0].number", {}, [pb.Comparison(name="c", left="at", operator="<", number=1)]),
        ("contract.comparisons[0].name", {}, [pb.Comparison(name="at", left="seats", operator="<", number=1)]),
        ("contract.expectations[0].statistic", {}, [pb.Expectation(name="e", min=1)]),
        ("contract.expectations[0].column", {}, [pb.Expectation(name="e", statistic=5, column="carrier", min=1)]),
        ("contract.expectations[0].quantile", {}, [pb.Expectation(name="e", statistic=8, column="delay", min=1)]),
        ("contract.expectations[0].min", {}, [pb.Expectation(name="e", statistic=1)]),
        ("contract.expectations[0].min", {}, [pb.Expectation(name="e", statistic=1, min=2, max=1)]),
        ("contract.expectations[0].policy", {}, [pb.Expectation(name="e", statistic=1, min=2, policy=9)]),
    ],
)  # fmt: skip
def test_wrong_rules_are_refused_by_field(field: str, changes: dict, rules: list) -> None:
    message = contract(**changes)
    for rule in rules:
        (message.comparisons if isinstance(rule, pb.Comparison) else message.expectations).append(rule)
    with pytest.raises(InvalidArgumentError) as caught:
        contract_from(message, "contract")
    assert caught.value.field == field


@pytest.fixture
def holding() -> pb.DataContract:
    """A contract that holds batches with too many nulls."""
    return contract(delay={"max_null_rate": 0.5, "policies": {"null_rate": QUARANTINE}})


async def test_a_held_batch_waits_beside_the_table_and_is_released_once(tmp_path, holding) -> None:
    async with serving(tmp_path) as client:
        await client.register(holding)
        bad = lines(row("a", delay=None), row("b", delay=None), row("c"), row("d", carrier="?"))
        answer = await client.write(1, bad)
        assert (answer.accepted, answer.quarantined, answer.rejected) == (0, 3, 1)
        again = await client.write(1, bad)
        assert (again.replayed, again.quarantined) == (True, 3)
        await client.write(2, records(0, 2))
        assert client.lake().num_rows == 2
        assert client.lake("flights__quarantine")["event_id"].to_pylist() == ["a", "b", "c"]
        (held,) = await listed(client)
        assert (held.source, held.offset, held.reason, held.column, held.rows) == (
            "s",
            1,
            "EXPECTATION_FAILED",
            "delay",
            3,
        )
        assert len(await client.messages()) == 1
    async with serving(tmp_path) as client:
        await client.write(3, records(10, 1))
        done = await client.stub.ReleaseQuarantine(pb.ReleaseQuarantineRequest(contract="flights", ids=[held.id]))
        assert (done.batches, done.accepted, done.rejected) == (1, 3, 0)
        done = await client.stub.ReleaseQuarantine(pb.ReleaseQuarantineRequest(contract="flights"))
        assert (done.batches, done.accepted) == (0, 0)
        assert sorted(client.lake()["event_id"].to_pylist()) == ["a", "b", "c", "e0", "e1", "e10"]
        assert await listed(client) == []
        assert [(b.released, b.discarded) for b in await listed(client, settled=True)] == [(True, False)]


async def test_a_held_batch_can_be_discarded(tmp_path, holding) -> None:
    async with serving(tmp_path) as client:
        await client.register(holding)
        await client.write(1, lines(row("a", delay=None)))
        await client.write(2, lines(row("b", delay=None)))
        first, second = await listed(client)
        discard = pb.DiscardQuarantineRequest(contract="flights", ids=[first.id])
        assert (await client.stub.DiscardQuarantine(discard)).batches == 1
        assert (await client.stub.DiscardQuarantine(discard)).batches == 0
        done = await client.stub.ReleaseQuarantine(pb.ReleaseQuarantineRequest(contract="flights"))
        assert (done.batches, done.accepted) == (1, 1)
        assert client.lake()["event_id"].to_pylist() == ["b"]
        assert [b.id for b in await listed(client)] == []
        assert second.id > first.id


async def listed(client: Client, *, settled: bool = False) -> list[pb.QuarantinedBatch]:
    request = pb.ListQuarantineRequest(contract="flights", settled=settled)
    return list((await client.stub.ListQuarantine(request)).batches)
