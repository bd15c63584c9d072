"""The sample ratio of an A/B test: rarely called wrong when it is right, soon when it is not, and then the result decides nothing."""

import numpy as np
import pytest
from millrace_rollout_controller import ratio
from millrace_rollout_controller.comparisons import Comparison
from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.evidence import Evidence, GatewayFigures, Poll, advance
from millrace_rollout_controller.ratio import Ratio
from millrace_rollout_controller.stages import split_in_force

from .world import World, spec

AB = """
strategy: ABTest
abTest: {split: 50, minRequests: 100, goal: outcome/accuracy, onSuccess: Promote}
"""
BETTER = {
    "outcome/accuracy": Comparison(
        weight=5000.0,
        total=1500.0,
        variance=400.0,
        candidate=Sums(n=10000.0, total=9000.0),
        stable=Sums(n=10000.0, total=6000.0),
    )
}


class Split(World):
    """A world whose requests arrive in some ratio."""

    ratio = Ratio()

    def evidence(self) -> Evidence:
        return super().evidence().model_copy(update={"ratio": self.ratio})


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_right_split_is_rarely_called_wrong(share: float) -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(1000):
        known, hits = Ratio(), rng.binomial(50, share, 60)
        found = ""
        for one in hits:
            known = known.plus(share, int(one), 50 - int(one))
            found = found or ratio.mismatch(known)
        wrong += bool(found)
    assert wrong <= 5, "one in a thousand is promised"


def test_a_wrong_split_is_found_and_a_small_one_is_left_alone() -> None:
    rng = np.random.default_rng(2)
    known, n = Ratio(), 0
    while not ratio.mismatch(known):
        one = int(rng.binomial(50, 0.4))
        known, n = known.plus(0.5, one, 50 - one), n + 50
        assert n < 3000
    assert "instead of 50.00%" in ratio.mismatch(known)
    assert not ratio.mismatch(Ratio(share=0.5, candidate=478_000, stable=522_000)), "4 % of the share"
    assert not ratio.mismatch(Ratio())


def test_an_invalid_result_promotes_nobody_and_says_so() -> None:
    world = Split(spec("1.0.0", AB)).served()
    world.apply(spec("1.1.0", AB))
    world.until("Progressing")
    world.ratio = Ratio(share=0.5, candidate=300, stable=700)
    world.requests, world.comparisons = 1000, BETTER
    for _ in range(5):
        world.tick()
    assert world.status.weight == 50
    assert "the result is invalid" in world.status.waiting
    condition = next(c for c in world.status.conditions if c.type == "ExperimentValid")
    assert (condition.status, condition.reason) == ("False", "SampleRatioMismatch")
    assert [event.reason for event in world.status.events].count("SampleRatioMismatch") == 1
    # What was wrong once stays wrong for this experiment.
    world.ratio = Ratio(share=0.5, candidate=5000, stable=5000)
    for _ in range(5):
        world.tick()
    assert world.status.mismatch
    assert world.act("abort") is None
    world.until("RolledBack")


def test_a_valid_result_promotes() -> None:
    world = Split(spec("1.0.0", AB)).served()
    world.apply(spec("1.1.0", AB))
    world.until("Progressing")
    world.ratio = Ratio(share=0.5, candidate=490, stable=510)
    world.requests, world.comparisons = 1000, BETTER
    for _ in range(30):
        world.tick()
    assert world.status.stable is not None
    assert world.status.stable.ref.version == "1.1.0"


def test_requests_count_only_while_the_split_is_in_force_and_no_rule_moves_callers() -> None:
    world = Split(spec("1.0.0", AB)).served()
    world.apply(spec("1.1.0", AB))
    world.until("Progressing")
    assert split_in_force(world.wanted, world.status) is None
    world.tick()
    world.tick()
    assert split_in_force(world.wanted, world.status) == 0.5
    rules = {"sticky": {"header": "x-user-id"}, "rules": [{"when": "true", "to": "candidate"}]}
    assert split_in_force(spec("1.1.0", AB, routing=rules), world.status) is None
    evidence = Evidence()
    for requests in (0, 10, 30):
        figures = GatewayFigures("x", {"2": Counts(requests=requests), "1": Counts(requests=requests * 2)})
        evidence = advance(
            evidence, Poll({"a": figures}), trial=1, step=0, candidate="2", stable="1", wanted=(), gateways=["a"],
            split=0.5 if requests > 10 else None,
        )  # fmt: skip
    assert evidence.ratio == Ratio(share=0.5, candidate=20, stable=40)
