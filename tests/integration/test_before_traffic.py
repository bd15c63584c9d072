"""What a version shows before its first caller, with the real Envoy and Triton: warm by logged requests, and answers like stable's to copies."""

from collections.abc import Iterator
from typing import Any

import pytest
from millrace_api.rollout.v1.rollout_pb2 import VERDICT_FAIL, VERDICT_PASS

from tests.integration.test_strategies import apply, load, reach
from tests.stack import MODEL, Stack, running_stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROLLOUT: dict[str, Any] = {
    "strategy": "Canary",
    "steps": [{"weight": 50}],
    # Whether latency becomes steady is this machine's business: `test_warm_service.py` judges a server of known latency.
    "warmup": {"requests": 20, "maxTrials": 5, "maxP99Ratio": 50, "timeoutSeconds": 100, "required": "Never"},
    "shadow": {"mirrorPercent": 100, "minPairs": 200, "segment": {"header": "x-user-id"}},
    "gates": [
        {"metric": "errorRate", "max": 0.05},
        {"metric": "shadow/labelFlipRate", "max": 0.05},
        {"metric": "shadow/scoreShift", "max": 0.1},
        {"metric": "shadow/maxAbsDiff", "max": 0.5},
    ],
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("run")) as running:
        running.load_definitions()
        # Scores of the load's row: 0.5, 0.51 and 0.27.
        for version, bias in (("1.0.0", 0.0), ("1.1.0", 0.05), ("1.2.0", -1.0)):
            running.register(version, bias)
        apply(running, "1.0.0", {"strategy": "BlueGreen"})
        running.wait_stable("1.0.0")
        yield running


def test_a_version_that_answers_like_stable_gets_its_traffic(stack: Stack) -> None:
    with load(stack) as callers:
        callers.more(100)
        apply(stack, "1.1.0", ROLLOUT)
        done = reach(stack, "1.1.0 is stable", stable_version="1.1.0", candidate_version="")
        gates = {gate.gate.split()[0]: gate for gate in done.gates}
        assert "logged requests" in gates.pop("warmup").evidence
        assert {gate.verdict for gate in gates.values()} == {VERDICT_PASS}, gates
        flips = gates["shadow/labelFlipRate"]
        assert flips.candidate_samples >= 200
        assert "label flips 0.0000" in flips.evidence
        assert "in segment" in flips.evidence
        assert "mean shift 0.0125" in gates["shadow/scoreShift"].evidence


def test_one_that_answers_otherwise_never_gets_a_caller(stack: Stack) -> None:
    before = stack.client.rollout.get(MODEL).stable_version
    with load(stack) as callers:
        callers.more(100)
        callers.reset()
        apply(stack, "1.2.0", ROLLOUT)
        back = reach(stack, "1.2.0 is sent away", phase="RolledBack", stable_version=before)
        failed = [gate for gate in back.gates if gate.verdict == VERDICT_FAIL and not gate.gate.startswith("warmup")]
        assert failed[0].gate.startswith("shadow/")
        assert set(callers.answered) == {before}
