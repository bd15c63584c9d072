"""Every pair of stages, and the approvals of Production."""

from datetime import UTC, datetime

import pytest
from millrace_kit.errors import FailedPreconditionError
from millrace_registry.models import Approval, Content, Stage, Version
from millrace_registry.stages import check_transition

D, T, S, P, A = Stage
LEGAL = {(D, T), (T, S), (S, P), (T, D), (S, T), (P, S), (D, A), (T, A), (S, A), (P, A), (A, D)}
AT = datetime(2026, 1, 1, tzinfo=UTC)


def version(stage: Stage, *approved: Stage, spent: int = 0) -> Version:
    approvals = tuple(Approval("bob", to_stage, "", AT) for to_stage in approved)
    return Version(Content("m", "1.0.0", (), "p"), stage, AT, 1, approvals, spent)


@pytest.mark.parametrize("before", Stage)
@pytest.mark.parametrize("after", Stage)
def test_every_pair(before: Stage, after: Stage) -> None:
    subject = version(before, P)
    if (before, after) in LEGAL:
        check_transition(subject, after)
    else:
        with pytest.raises(FailedPreconditionError) as caught:
            check_transition(subject, after)
        assert caught.value.reason == "ILLEGAL_TRANSITION"
        assert caught.value.metadata["to_stage"] == after


@pytest.mark.parametrize(("approved", "spent"), [((), 0), ((T, S), 0), ((P,), 1), ((P, S), 1)])
def test_production_needs_an_unspent_approval(approved: tuple[Stage, ...], spent: int) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        check_transition(version(S, *approved, spent=spent), P)
    assert caught.value.reason == "APPROVAL_MISSING"
    check_transition(version(S, *approved, P, spent=spent), P)
