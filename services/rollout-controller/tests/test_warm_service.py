"""The warm gate in the whole service: real Triton servers, requests that a gateway has logged."""

from pathlib import Path

from millrace_rollout_controller.probe import sample_request

from .peers import Peers, gateway, traffic
from .support import until, version_ref
from .test_service import apply, background, controller, peers, phase, settings

__all__ = ["peers"]

WARM = {
    "steps": [{"weight": 50}],
    "warmup": {"requests": 20, "windowSeconds": 0, "maxTrials": 100, "maxP99Ratio": 20, "timeoutSeconds": 90},
}


async def test_a_new_version_answers_logged_requests_before_it_gets_weight(tmp_path: Path, peers: Peers) -> None:
    peers.samples = [sample_request(version_ref("1.0.0", b"")).SerializeToString()] * 3
    async with controller(settings(tmp_path, peers)) as (stub, address), background(gateway(peers, address)):
        await apply(stub, "1.0.0", rollout=WARM)
        await phase(stub, "Promoted", "1.0.0")
        await apply(stub, "1.1.0", rollout=WARM)
        promoted = await phase(stub, "Promoted", "1.1.0", 120)
        (gate,) = promoted.gates
        assert gate.gate == "warmup"
        assert "3 logged requests" in gate.evidence
        assert gate.candidate_samples >= 60
        reasons = [event.reason for event in promoted.events]
        assert reasons.index("Warm") < reasons.index("StepStarted")


async def test_one_that_cannot_answer_what_stable_answered_never_gets_weight(tmp_path: Path, peers: Peers) -> None:
    # A row of five: the tiny model takes four.
    request = sample_request(version_ref("1.0.0", b""))
    request.inputs[0].shape[1] = 5
    request.raw_input_contents[0] = bytes(20)
    peers.samples = [request.SerializeToString()]
    block = {**WARM, "warmup": {"requests": 10, "windowSeconds": 0, "maxTrials": 3}}
    async with (
        controller(settings(tmp_path, peers)) as (stub, address),
        background(gateway(peers, address), traffic(peers)),
    ):
        await apply(stub, "1.0.0", rollout=block)
        await phase(stub, "Promoted", "1.0.0")
        await apply(stub, "1.1.0", rollout=block)
        back = await phase(stub, "RolledBack", "1.0.0")
        assert any(c.reason == "WarmupFailed" for c in back.conditions), back.conditions
        await until(lambda: peers.versions() == {"1.0.0": 100.0})
        assert peers.requests["1.1.0"] == 0
    assert peers.problems == []
