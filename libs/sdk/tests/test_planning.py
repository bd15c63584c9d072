"""What `lint` says about a manifest's gates, held against rollouts played by the tests that the gates use."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from millrace import planning
from millrace.cli.main import main
from millrace.kubectl.actions import _target
from millrace.kubectl.commands import root
from millrace.planning import Traffic, plan
from millrace.view import history_text
from millrace_api.rollout.v1.rollout_pb2 import VERDICT_PASS, Decision, GateResult
from millrace_kit.power import Claim, Plays, draw
from millrace_kit.sequential import Sample

SPEC = yaml.safe_load("""
model: flight-delay
version: 1.1.0
rollout:
  steps: [{weight: 5, minRequests: 50}, {weight: 50, minRequests: 5000}, {weight: 100}]
  gates:
    - {metric: errorRate, max: 0.05}
    - {metric: outcome/accuracy, compare: notWorseThanStable, margin: 0.05, required: Promotion}
    - {promql: up, max: 1, required: Never}
""")


def needs() -> dict[tuple[str, int], planning.Need]:
    found = plan(SPEC, Traffic(rate=100.0, outcome_share=0.5))
    return {(need.gate.split()[0], need.step): need for need in found.needs}


def test_a_plan_has_a_line_for_every_step_and_gate_with_time_at_the_traffic() -> None:
    found = needs()
    assert set(found) == {(metric, step) for metric in ("errorRate", "outcome/accuracy") for step in (1, 2)}
    bound, compared = found["errorRate", 1], found["outcome/accuracy", 1]
    assert bound.passing is not None
    assert 80 <= bound.passing <= 300, "no error in 81 requests passes a bound of 0.05"
    assert compared.passing is not None
    assert compared.seconds == pytest.approx(compared.passing / (100 * 0.05))
    more = found["outcome/accuracy", 2].passing
    assert more is not None
    assert more > compared.passing, "with fewer values of stable it takes more of the candidate"


def test_four_of_five_rollouts_have_the_verdict_by_then() -> None:
    passing = needs()["outcome/accuracy", 1].passing
    assert passing is not None
    values = passing // 2  # half of the requests have an outcome
    rng, plays = np.random.default_rng(99), Plays(Claim(margin=0.05, higher_is_better=True, steps=3), 400)
    for _ in range(values // 10):
        plays.absorb(draw(rng, 400, 10, 0.8, binary=True), draw(rng, 400, 190, 0.8, binary=True))
    assert 0.72 <= plays.passed.mean() <= 0.9


VALUES = yaml.safe_load("""
rollout:
  steps: [{weight: 20, minRequests: 100}]
  gates:
    - {metric: business/revenue, compare: notWorseThanStable, margin: 2, better: Higher, valueRange: [0, 500], segment: client}
    - {metric: outcome/mae, max: 10}
""")


def test_values_of_any_unit_are_planned_where_their_spread_is_known() -> None:
    unknown = plan(VALUES, Traffic())
    assert not unknown.needs
    assert unknown.warnings[0].endswith(
        "not planned without what its values are like: --baseline business/revenue=MEAN:DEVIATION"
    )
    known = Traffic(
        50.0, 0.5, {"business/revenue": 12.0, "outcome/mae": 12.0}, {"business/revenue": 30.0, "outcome/mae": 4.0}
    )
    revenue, error = plan(VALUES, known).needs
    # At one look of fixed size: the normal quantiles of 0.95 and 0.8; looking always costs less than three times that.
    fixed = (1.645 + 0.842) ** 2 * 30.0**2 * 1.25 / 2.0**2 / 0.5
    assert revenue.passing is not None
    assert fixed < revenue.passing < 3 * fixed
    assert revenue.failing is not None
    assert revenue.passing < revenue.failing < 4 * revenue.passing
    assert revenue.gate == "business/revenue notWorseThanStable (margin 2) by client"
    assert revenue.seconds == pytest.approx(revenue.passing / 10.0)
    assert error.passing is None, "stable itself is beyond the bound"


def test_steps_that_cannot_decide_their_gates_are_warned_of() -> None:
    [first, query] = plan(SPEC, Traffic()).warnings
    assert first.startswith("spec.rollout.gates[0]: errorRate <= 0.05 needs about")
    assert "up to step 1 (5 %) minRequests asks for 50" in first
    assert query.startswith("spec.rollout.gates[2]: promql <= 1 is not planned")


def test_a_declared_maximum_needs_less() -> None:
    def passing(**more: object) -> int:
        gate = {"metric": "outcome/accuracy", "compare": "notWorseThanStable", "margin": 0.05, "required": "Promotion"}
        steps = [{"weight": 50, "minRequests": 1}]
        [need] = plan({"rollout": {"steps": steps, "gates": [gate | more]}}, Traffic()).needs
        assert need.passing is not None
        return need.passing

    assert passing(maxSamples=1500) < passing()


@pytest.mark.parametrize("command", ["kubectl", "millrace"])
def test_lint_prints_the_plan(tmp_path: Path, command: str) -> None:
    path = tmp_path / "deployment.yaml"
    document = {"apiVersion": "millrace.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "flights"}}
    path.write_text(yaml.safe_dump(document | {"spec": SPEC}), encoding="utf-8")
    arguments = ["lint", str(path), "--plan", "--rate", "100", "--baseline", "outcome/accuracy=0.9"]
    done = CliRunner().invoke(root if command == "kubectl" else main, arguments)
    assert done.exit_code == 0, done.output
    assert "STEP   WEIGHT   GATE" in done.stdout
    assert "at 100 requests a second" in done.stdout
    assert "warning: spec.rollout.gates[0]" in done.stderr
    for spread in ("business/revenue=1", "business/revenue=1:0", "outcome/mae=x:1"):
        assert CliRunner().invoke(root, ["lint", str(path), "--baseline", spread]).exit_code == 2
    wrong = CliRunner().invoke(root, ["lint", str(path), "--baseline", "luck=1"])
    assert wrong.exit_code == 2
    quiet = CliRunner().invoke(root, ["lint", str(path), "--no-plan"])
    assert "warning" not in quiet.stderr


def test_history_is_a_table_with_the_evidence_when_wide() -> None:
    gate = GateResult(gate="errorRate <= 0.05", verdict=VERDICT_PASS, evidence="e-value 31")
    made = [
        Decision(at="2026-01-01T00:00:00Z", revision=1, version="1.0.0", decision="FirstVersion", weight=0),
        Decision(
            at="2026-01-02T00:00:00Z", revision=2, version="1.1.0", decision="Promoted", weight=100, gates=[gate],
            bundle_sha256="ab" * 32,
        ),
    ]  # fmt: skip
    assert [line.split()[0] for line in history_text(made, "table").splitlines()] == ["REVISION", "1", "2"]
    wide = history_text(made, "wide")
    assert "    pass: errorRate <= 0.05: e-value 31" in wide
    assert f"    evidence: artifact {'ab' * 32}" in wide
    assert '"decision": "Promoted"' in history_text(made, "json")


def test_undo_names_a_version_or_a_revision() -> None:
    status = {
        "previousVersion": "1.1.0",
        "history": [{"revision": 1, "version": "1.0.0"}, {"version": "1.1.0"}, {"revision": 2, "version": "1.1.0"}],
    }
    assert [_target(status, to) for to in ("", "1", "1.0.0", "2", "9", "1.2.0")] == [
        "1.1.0", "1.0.0", "1.0.0", "1.1.0", "", "",
    ]  # fmt: skip


def test_comparisons_of_latencies_are_planned_for_a_spread() -> None:
    def need(metric: str, spread: float, margin: float = 0.2) -> planning.Need:
        gate = {"metric": metric, "compare": "notWorseThanStable", "margin": margin, "required": "Promotion"}
        spec = {"rollout": {"steps": [{"weight": 50, "minRequests": 1}], "gates": [gate]}}
        [found] = plan(spec, Traffic(rate=10.0, baselines={"latencySpread": spread})).needs
        return found

    narrow, wide, median = need("latencyP95Ms", 0.3), need("latencyP95Ms", 1.0), need("latencyP50Ms", 0.3)
    assert narrow.passing is not None
    assert median.passing is not None
    assert wide.passing is not None
    assert 20 < median.passing < narrow.passing < wide.passing, (
        "the same margin is less of a wider spread, and of a rarer event"
    )
    # Stable's percentile is learned from ten requests beyond it first.
    assert narrow.passing > 10 / 0.05
    assert narrow.failing is not None
    assert narrow.seconds == pytest.approx(narrow.passing / 5.0)


def test_a_latency_plan_holds_for_rollouts_played_with_latencies() -> None:
    """Four of five equal versions have passed by then: latencies are drawn here, and counted as the gate counts them."""
    slow, margin, spread = 0.05, 0.2, 0.5
    edge = float(np.exp(spread * 1.6449))
    gate = {"metric": "latencyP95Ms", "compare": "notWorseThanStable", "margin": margin, "required": "Promotion"}
    [need] = plan({"rollout": {"steps": [{"weight": 50, "minRequests": 1}], "gates": [gate]}}, Traffic()).needs
    assert need.passing is not None
    rng, plays = np.random.default_rng(3), Plays(Claim(margin=0.0, steps=2), 300)
    batch = 20
    for _ in range((need.passing - int(10 / slow)) // batch):
        mine, theirs = (np.exp(spread * rng.standard_normal((300, batch))) for _ in range(2))
        counts = [(mine > edge * (1 + margin)).sum(axis=1), (theirs > edge).sum(axis=1)]
        one, two = (
            Sample(np.full(300, float(batch)), count.astype(float), count.astype(float), True) for count in counts
        )
        plays.absorb(one, two)
    assert 0.7 <= plays.passed.mean() <= 0.92


def test_what_is_not_planned_says_why() -> None:
    gates = [
        {"metric": "throughput", "min": 5},
        {"metric": "drift/prediction", "max": 0.1},
        {"metric": "shadow/labelFlipRate", "max": 0.01},
        {"metric": "shadow/maxAbsDiff", "max": 0.5},
        {"promql": "up", "max": 1, "failureLimit": 5},
    ]
    found = plan({"rollout": {"steps": [{"weight": 50}], "gates": gates}}, Traffic())
    assert not found.needs
    words = ["windows of 10 s", "about 550 of", "about 400 compared rows", "412 compared rows", "5 answers in a row"]
    assert [part in warning for part, warning in zip(words, found.warnings, strict=True)] == [True] * 5, found.warnings
    servers = {"countedBy": "Servers", "steps": [{"weight": 50}], "gates": [{"metric": "latencyP99Ms", "max": 50}]}
    assert "stays undecided" in plan({"rollout": servers}, Traffic()).warnings[0]
