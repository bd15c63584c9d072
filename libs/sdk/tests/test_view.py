"""The rows that people see of a ModelDeployment."""

from datetime import UTC, datetime

import pytest
from millrace.view import (
    COLUMNS,
    WIDE_COLUMNS,
    age,
    comparison_name,
    comparison_words,
    deployment_row,
    history_text,
    pool_lines,
    table,
)
from millrace_api.rollout.v1 import rollout_pb2 as rollout

NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("created", "shown"),
    [
        ("2026-01-01T23:59:18Z", "42s"),
        ("2026-01-01T23:57:00Z", "3m"),
        ("2026-01-01T19:00:00Z", "5h"),
        ("2025-12-30T00:00:00Z", "3d"),
        ("2026-01-02T00:00:09Z", "0s"),
        ("", "-"),
    ],
)
def test_age(created: str, shown: str) -> None:
    assert age(created, NOW) == shown


def test_row_of_a_moving_rollout() -> None:
    gate = rollout.GateResult(gate="errorRate <= 0.05", verdict=rollout.VERDICT_UNDECIDED)
    deployment = rollout.Deployment(
        name="m", ready=True, stable_version="1.0.0", candidate_version="1.1.0", candidate_weight=20, step=1, steps=4,
        created_at="2026-01-01T23:59:18Z", phase="Progressing", generation=2, gates=[gate],
    )  # fmt: skip
    assert deployment_row(deployment, NOW) == ("m", "True", "1.0.0", "1.1.0", "20%", "2/4", "42s")
    assert deployment_row(deployment, NOW, wide=True)[-4:] == ("Progressing", "2", "-", "errorRate <= 0.05: undecided")
    deployment.pool.CopyFrom(
        rollout.PoolPlace(pool="small", resident=2, waiting=1, set_aside_mib=600, capacity_mib=700)
    )
    deployment.pool.versions.add(version="1.0.0", state="Resident", memory_mib=300)
    assert deployment_row(deployment, NOW, wide=True)[-2] == "small: Resident"
    deployment.pool.versions.add(version="1.1.0", state="Waiting", memory_mib=300, waiting="needs 300 MiB")
    assert deployment_row(deployment, NOW, wide=True)[-2] == "small: 1.0.0 Resident, 1.1.0 Waiting"
    assert pool_lines(deployment.pool) == [
        "small        2 resident, 1 waiting, 600 of 700 MiB set aside",
        "1.0.0        Resident, 300 MiB",
        "1.1.0        Waiting, 300 MiB: needs 300 MiB",
    ]
    assert pool_lines(rollout.PoolPlace()) == []


def test_row_at_rest_has_no_weight_and_step() -> None:
    deployment = rollout.Deployment(name="m", stable_version="1.0.0", steps=4, step=3)
    assert deployment_row(deployment, NOW) == ("m", "False", "1.0.0", "-", "-", "-", "-")


def test_a_comparison_in_words() -> None:
    result = rollout.ComparisonResult(
        metric="outcome/accuracy", candidate=0.9, stable=0.8, candidate_samples=500, stable_samples=600, lower=0.02, upper=0.18,
        confidence=0.95, better="candidate",
    )  # fmt: skip
    assert comparison_words(result) == (
        "candidate 0.9 over 500, stable 0.8 over 600, difference +0.02 to +0.18 at 95%: candidate"
    )


def test_a_comparison_of_a_group_says_which_and_how() -> None:
    result = rollout.ComparisonResult(
        metric="business/revenue", segment="UA", candidate=9, stable=8, candidate_samples=500, stable_samples=600, lower=-1, upper=3,
        confidence=0.95, better="undecided", evidence="exact at every look",
    )  # fmt: skip
    assert comparison_name(result) == "business/revenue of 'UA'"
    assert comparison_words(result).endswith("difference -1 to +3 at 95%: undecided; exact at every look")
    decision = rollout.Decision(at="2026-01-01T00:00:00Z", version="1.1.0", decision="Promoted", comparisons=[result])
    assert "    business/revenue of 'UA': candidate 9 over 500" in history_text([decision], "wide")


def test_columns_line_up() -> None:
    text = table(("A", "LONG"), [("xxx", "1"), ("y", "")])
    assert text.splitlines() == ["A     LONG", "xxx   1", "y"]
    assert len(WIDE_COLUMNS) == len(COLUMNS) + 4
