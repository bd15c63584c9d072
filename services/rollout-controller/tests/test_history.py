"""Every decision is kept with its evidence, undo goes to any version that was stable, and the registry gets one bundle a rollout."""

import hashlib
import json

import grpc.aio
import pytest
from millrace_kit.clock import SystemClock
from millrace_rollout_controller.actions import Refused
from millrace_rollout_controller.archive import Archive
from millrace_rollout_controller.history import MAX_HISTORY, once_stable
from millrace_rollout_controller.kubernetes import annotations
from millrace_rollout_controller.peers import Registry
from millrace_rollout_controller.state import Bundle

from .peers import Peers, serving
from .support import until
from .world import World, spec


def promoted(world: World, version: str) -> World:
    world.apply(spec(version))
    world.verdict, world.requests = "pass", 1000
    for _ in range(80):
        status = world.tick()
        if status.stable is not None and status.stable.ref.version == version:
            return world
    raise AssertionError(world.status.waiting)


def test_decisions_carry_their_evidence_and_revisions_count_stable_versions() -> None:
    world = promoted(World(spec("1.0.0")).served(), "1.1.0")
    made = world.status.history
    assert [(one.decision, one.version, one.revision) for one in made] == [
        ("FirstVersion", "1.0.0", 1),
        ("StepPassed", "1.1.0", 0),
        ("StepPassed", "1.1.0", 0),
        ("Promoted", "1.1.0", 2),
    ]
    assert [one.weight for one in made[1:]] == [5, 50, 100]
    assert made[1].gates[0].verdict == "pass"
    assert "e-value" in made[1].gates[0].evidence
    assert made[3].against == "1.0.0"


def test_the_bundle_of_a_rollback_says_why_and_is_named_by_its_content() -> None:
    world = World(spec("1.0.0")).served()
    world.apply(spec("1.1.0"))
    world.until("Progressing")
    world.verdict = "fail"
    world.until("RolledBack")
    last = world.status.history[-1]
    assert (last.decision, last.version, last.revision) == ("GateFailed", "1.1.0", 0)
    [bundle] = world.status.unsent
    assert bundle.sha256 == last.bundle == hashlib.sha256(bundle.text.encode()).hexdigest()
    said = json.loads(bundle.text)
    assert (said["decision"], said["version"], said["against"]) == ("GateFailed", "1.1.0", "1.0.0")
    assert said["decisions"][-1]["gates"][0]["verdict"] == "fail"
    assert said["rollout"]["gates"][0]["max"] == 0.05


def test_undo_goes_back_to_a_version_or_a_revision_without_steps() -> None:
    world = promoted(promoted(World(spec("1.0.0")).served(), "1.1.0"), "1.2.0")
    assert (once_stable(world.status, "1"), once_stable(world.status, "1.1.0")) == ("1.0.0", "1.1.0")
    for wrong in ("9.9.9", "7", "0"):
        refused = world.act("undo", to=wrong)
        assert isinstance(refused, Refused)
        assert refused.field == "to"
    refused = world.act("undo", to="3")
    assert isinstance(refused, Refused)
    assert refused.reason == "ALREADY_STABLE"
    world.verdict = "undecided"
    assert world.act("undo", to="1") is None
    world.until("Preparing")
    world.until("Promoted")
    assert world.status.stable is not None
    assert world.status.stable.ref.version == "1.0.0"
    assert world.status.history[-1].revision == 4


def test_in_a_cluster_the_patch_names_the_version_to_go_back_to() -> None:
    world = promoted(promoted(World(spec("1.0.0")).served(), "1.1.0"), "1.2.0")
    asked = annotations.read("undo abc")
    status, record = annotations.perform(asked, spec("1.0.0"), world.status, world.now)
    assert (record["result"], status.undo) == ("Done", "1.0.0")
    status, record = annotations.perform(asked, spec("1.2.0"), world.status, world.now)
    assert (record["result"], status.undo) == ("Refused", "")
    assert "1.1.0" in record["message"]


def test_history_is_bounded() -> None:
    world = World(spec("1.0.0")).served()
    for number in range(12):
        promoted(world, "1.1.0" if number % 2 == 0 else "1.0.0")
    assert len(world.status.history) == MAX_HISTORY
    assert world.status.history[-1].revision == 13
    assert len(world.status.unsent) == 5


async def test_a_bundle_is_sent_until_the_registry_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace_rollout_controller.archive.RETRY_S", 0.05)
    said = {"model": "m", "version": "1.1.0", "deployment": "d", "decision": "Promoted", "against": "1.0.0"}
    text = json.dumps({**said, "ended_at": "2026-01-02T03:04:05+00:00", "long": "x" * 3_000_000})
    bundle = Bundle(sha256=hashlib.sha256(text.encode()).hexdigest(), text=text)
    async with serving(Peers(refuses=True, links=False)) as peers, grpc.aio.insecure_channel(peers.address) as channel:
        archive = Archive(Registry(channel, SystemClock(), timeout_s=5, artifact_timeout_s=10).put, SystemClock())
        for _ in range(3):
            assert archive.left([bundle]) == [bundle]
        assert not peers.kept
        peers.refuses = False
        await until(lambda: archive.left([bundle]) and peers.kept, what="the registry has the content")
        assert not peers.linked
        peers.links = True
        await until(lambda: archive.left([bundle]) == [], what="the bundle is kept")
        assert peers.kept == {bundle.sha256: text.encode()}
        linked = peers.linked["m 1.1.0"]
        assert (linked.deployment, linked.decision, linked.against) == ("d", "Promoted", "1.0.0")
        assert (linked.evidence_sha256, linked.evidence_size_bytes) == (bundle.sha256, len(text))
        assert linked.ended_at.ToJsonString() == "2026-01-02T03:04:05Z"
        archive.close()
