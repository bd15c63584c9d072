"""Steps 5 to 9: rollouts, the replay of July, drift, retraining, and the way back from one prediction."""

import tempfile
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import broken
import flights as data
from millrace.lineage import trace_prediction
from millrace.view import verdict_word
from millrace_api.drift.v1.drift_pb2 import DriftKind
from millrace_api.registry.v1 import registry_pb2
from millrace_api.rollout.v1.rollout_pb2 import Deployment
from millrace_api.training.v1 import training_pb2

from loop.common import ACTOR, DRIFT_REASON, DRIFT_START, SAMPLE, YEAR_END, Loop, until, wait_for_features
from loop.learning import follow, promote_in_registry, register_pipeline, train
from loop.replay import MODEL, Replay, Tally

FIRST_REQUESTS = 1500
# A rollout that has not ended after this many requests is stuck.
MOST_REQUESTS = 16_000
DRIFT_DAYS = 8
RESTING = frozenset({"Promoted", "RolledBack", "Degraded"})


def apply_manifest(loop: Loop, version: str) -> None:
    """`millrace apply -f` of the sample's manifest for `version`."""
    answer = loop.client.rollout.apply((SAMPLE / "manifests" / f"{version}.yaml").read_text())
    loop.story.say(f"modeldeployment/{answer.deployment.name} {answer.result}: version {version}")


def deploy_first(loop: Loop) -> None:
    """Step 5: two Triton replicas serve 1.0.0."""
    apply_manifest(loop, "1.0.0")

    def serving() -> Deployment | None:
        deployment = loop.client.rollout.get(MODEL)
        return deployment if deployment.ready and deployment.stable_version == "1.0.0" else None

    deployment = until("1.0.0 serves", serving)
    endpoints = [endpoint for arm in deployment.arms for endpoint in arm.endpoints]
    loop.story.expect(len(endpoints) == 2, "two replicas serve the version")
    loop.story.say(
        f"1.0.0 serves on {', '.join(endpoints)}", "Triton, digest of the model checked before it was loaded"
    )


def replay_july(loop: Loop) -> None:
    """Step 6: July begins; both kinds of client ask through the gateway."""
    tally = _replay(loop, "replay", lambda _replay, tally: tally.predictions >= FIRST_REQUESTS)
    loop.story.expect(not tally.errors, f"no client request fails ({dict(tally.errors)})")
    loop.story.expect(tally.by_triton_client > 0, "the plain Triton client was answered")
    loop.story.say(
        f"{tally.predictions:,} predictions up to {loop.replay.position:%d %B %H:%M}, {tally.by_triton_client:,} of them by tritonclient",
        f"{tally.predictions / tally.seconds:.0f}/s with outcomes written as flights land; client p50 {tally.quantile_ms(0.5):.1f} ms, p99 {tally.quantile_ms(0.99):.1f} ms",
    )

    def outcomes() -> int | None:
        return next(
            (f.outcomes for f in loop.client.drift.outcomes(MODEL) if f.version == "1.0.0" and f.outcomes), None
        )

    joined = until("outcomes are joined to predictions", outcomes)
    loop.story.say(f"{joined:,} predictions have their outcome", "an outcome is known only when the flight has landed")


def _replay(loop: Loop, what: str, done: Callable[[Replay, Tally], bool]) -> Tally:
    with loop.story.progress(what, None) as bar:
        before = 0

        def show(replay: Replay, tally: Tally) -> None:
            nonlocal before
            bar.show(f"{what}  {replay.position:%d %b %H:%M}  {tally.predictions:,} predictions")
            bar.advance(tally.predictions - before)
            before = tally.predictions

        tally = loop.replay.run(done, show)
        loop.failed_requests += sum(tally.errors.values())
        return tally


def roll_out(loop: Loop, version: str, expected: str) -> Deployment:
    """Apply a version and replay flights until its rollout rests, telling every step and the gates behind it."""
    story = loop.story
    apply_manifest(loop, version)
    told: set[str] = set()
    last: Deployment = loop.client.rollout.get(MODEL)
    for event in last.events:
        told.add(f"{event.at}{event.reason}{event.message}")

    def rests(_replay: Replay, tally: Tally) -> bool:
        nonlocal last
        last = loop.client.rollout.get(MODEL)
        for event in last.events:
            if (key := f"{event.at}{event.reason}{event.message}") not in told:
                told.add(key)
                story.say(f"{event.reason}: {event.message}")
        ended = last.phase in RESTING and last.observed_generation == last.generation
        return ended or tally.predictions > MOST_REQUESTS

    tally = _replay(loop, f"canary {version}", rests)
    story.expect(last.phase == expected, f"the rollout of {version} ends {expected} (it is {last.phase})")
    for gate in last.gates:
        story.say(f"gate {gate.gate}: {verdict_word(gate.verdict)}", gate.evidence)
        story.keep("gates", f"{version}: {gate.gate}", f"{verdict_word(gate.verdict)}: {gate.evidence}")
    story.expect(not tally.errors, f"no client request fails ({dict(tally.errors)})")
    share = ", ".join(f"{v} {n:,}" for v, n in sorted(tally.versions.items()))
    story.say(f"{version} {expected} after {tally.predictions:,} requests ({share}), none failed")
    story.keep("rollouts", version, f"{expected} after {tally.predictions:,} requests ({share})")
    return last


def canaries(loop: Loop) -> None:
    """Step 7: a better version is promoted; a broken and a slow one are rolled back."""
    train(loop, "1.1.0", "all")
    promote_in_registry(loop, "1.1.0")
    promoted = roll_out(loop, "1.1.0", "Promoted")
    loop.story.expect(promoted.stable_version == "1.1.0", "1.1.0 is stable")
    for version, make, what in (
        ("1.2.0", broken.wrong_order, "its features in the wrong order"),
        ("1.3.0", broken.slow, "a graph that takes much longer"),
    ):
        _register_derived(loop, version, make, what)
        back = roll_out(loop, version, "RolledBack")
        loop.story.expect(back.stable_version == "1.1.0", f"1.1.0 has all traffic after {version}")


def _register_derived(loop: Loop, version: str, make: Callable[[bytes, list[str]], bytes], what: str) -> None:
    good = loop.client.registry.version(MODEL, "1.1.0")
    with tempfile.TemporaryDirectory() as folder:
        path = loop.client.registry.fetch_artifact(good.artifacts[0], Path(folder) / "good.onnx")
        bad = Path(folder) / "model.onnx"
        bad.write_bytes(make(path.read_bytes(), list(good.signature.feature_names)))
        derived = registry_pb2.ModelVersion(
            model=MODEL, version=version, platform=good.platform, signature=good.signature, lineage=good.lineage,
            tags={"made-by": "demo", "what": what},
        )  # fmt: skip
        derived.lineage.parent_version = "1.1.0"
        made = loop.client.registry.register_version(derived, {"model.onnx": bad}, actor=ACTOR)
    loop.story.say(f"{MODEL} {version} is registered: 1.1.0 with {what}", f"digest {made.digest[:16]}")


def drift(loop: Loop) -> None:
    """Step 8: a later month differs; a finding is published and one retraining follows."""
    client, story = loop.client, loop.story
    register_pipeline(loop, retrain=True)
    before = {finding.id for finding in client.drift.findings(MODEL)}
    runs_before = {run.id for run in client.training.runs()}
    start = DRIFT_START
    story.say(f"fast forward to {start:%d %B}", DRIFT_REASON)
    write_gap(loop, loop.replay.position, start)
    wait_for_features(client)
    loop.replay = Replay(client, start, YEAR_END, source="replay-drift")

    def found(_replay: Replay, _tally: Tally) -> bool:
        fresh = [f for f in client.drift.findings(MODEL) if f.id not in before and f.version == "1.1.0"]
        return bool(fresh) or loop.replay.position >= start + timedelta(days=DRIFT_DAYS)

    tally = _replay(loop, "replay", found)
    story.expect(not tally.errors, f"no client request fails ({dict(tally.errors)})")
    fresh = [f for f in client.drift.findings(MODEL) if f.id not in before and f.version == "1.1.0"]
    story.expect(bool(fresh), "the drift monitor raises a finding")
    for finding in fresh[:5]:
        kind = DriftKind.Name(finding.kind).removeprefix("DRIFT_KIND_").lower()
        story.say(
            f"finding: {finding.summary}",
            f"{kind}, {finding.test}: effect {finding.effect_size:.3f}, p {finding.p_value:.2g}",
        )
        story.keep(
            "drift",
            f"{kind} {finding.feature}",
            f"effect {finding.effect_size:.3f} ({finding.test}), p {finding.p_value:.2g}",
        )

    def retraining() -> training_pb2.Run | None:
        fresh_runs = [run for run in client.training.runs() if run.id not in runs_before]
        return fresh_runs[0] if fresh_runs else None

    run = until("the coordinator starts a retraining", retraining)
    story.say(f"run {run.id}: {run.cause}", "by the pipeline's retrain policy; further findings wait for the cooldown")
    ended = follow(loop, run.id)
    story.expect(ended.state == training_pb2.RUN_STATE_SUCCEEDED, "the retraining succeeds")
    started = [r for r in client.training.runs() if r.id not in runs_before]
    story.expect(len(started) == 1, f"exactly one retraining follows (there are {len(started)})")
    candidate = client.registry.version(MODEL, ended.model_version)
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted(candidate.metrics.items()))
    story.say(
        f"{MODEL} {candidate.version} is the candidate: {metrics}", "it waits in Development for people and gates"
    )
    story.keep("versions", f"{candidate.version} (retrained)", metrics)


def write_gap(loop: Loop, start: datetime, end: datetime) -> None:
    """Write what happened between two replays in bulk, so that history has no hole."""
    for contract in data.EVENT_TIMES:
        table = getattr(data, contract)(start, end)
        for _ in loop.client.ingestion.write_table(contract, table, source=f"gap-{start:%Y%m%d%H%M}"):
            pass


def walk_back(loop: Loop) -> None:
    """Step 9: from one prediction to everything that made it."""
    prediction_id, version = loop.replay.answered[-1]

    def known() -> bool | None:
        from millrace import MillraceError

        try:
            return bool(loop.client.drift.prediction(prediction_id).prediction_id)
        except MillraceError:
            return None

    until("the prediction is in the log", known)
    found = trace_prediction(loop.client, prediction_id)
    for depth, link in zip(found.depths(), found.links, strict=True):
        loop.story.say(f"{'  ' * depth}{'└ ' if depth else ''}{link.kind}: {link.identity}")
    loop.story.expect(not found.gaps, f"the chain is whole ({found.gaps})")
    kinds = [link.kind for link in found.links]
    for kind in ("prediction", "model version", "run", "training set", "table", "definitions"):
        loop.story.expect(kind in kinds, f"the chain names its {kind}")
    loop.story.keep("trace", "try it", f"millrace trace {prediction_id}   (version {version})")
