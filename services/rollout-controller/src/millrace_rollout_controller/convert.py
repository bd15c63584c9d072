"""Between the services' messages and this service's values."""

import json
from datetime import datetime

from millrace_api.drift.v1 import drift_pb2
from millrace_api.prediction.v1 import prediction_pb2
from millrace_api.registry.v1 import registry_pb2
from millrace_api.rollout.v1 import rollout_pb2
from millrace_kit import predict_plan, value_rules

from millrace_rollout_controller import manifest
from millrace_rollout_controller.conditions import is_ready
from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.hub import Table
from millrace_rollout_controller.idleness import GatewayActivity, Used
from millrace_rollout_controller.pool_look import Place
from millrace_rollout_controller.pool_plan import MIB
from millrace_rollout_controller.shadow_pairs import Pairs
from millrace_rollout_controller.stages import guarded_until, stages
from millrace_rollout_controller.state import (
    ArtifactRef,
    Bundle,
    ComparisonView,
    Decision,
    GateView,
    Route,
    RouteArm,
    Tensor,
    VersionRef,
)
from millrace_rollout_controller.store import Row
from millrace_rollout_controller.value_gates import Tracked

ACTOR = "rollout-controller"
"""Who links evidence, in the registry's audit."""
_BALANCING = {
    "LeastRequest": rollout_pb2.BALANCING_LEAST_REQUEST,
    "RoundRobin": rollout_pb2.BALANCING_ROUND_ROBIN,
    "ResponseTime": rollout_pb2.BALANCING_RESPONSE_TIME,
    "ConsistentHash": rollout_pb2.BALANCING_CONSISTENT_HASH,
}
_VERDICTS = {
    "pass": rollout_pb2.VERDICT_PASS,
    "fail": rollout_pb2.VERDICT_FAIL,
    "undecided": rollout_pb2.VERDICT_UNDECIDED,
}


def version_ref(version: registry_pb2.ModelVersion, model: registry_pb2.Model) -> VersionRef:
    """A registered version.

    Raises:
        InvalidArgumentError: what it declares for Predict, or what its values may be, is wrong.
    """
    declared = version.tags.get(predict_plan.TAG, "")
    plan = predict_plan.read_plan(declared, f"tags[{predict_plan.TAG!r}]")
    names = frozenset(version.signature.feature_names)
    value_rules.check_rules(version.signature.rules, "signature.rules", names)
    return VersionRef(
        model=version.model,
        version=version.version,
        digest=version.digest,
        platform=version.platform,
        artifacts=tuple(ArtifactRef(path=a.path, sha256=a.sha256, size_bytes=a.size_bytes) for a in version.artifacts),
        inputs=tuple(_tensor(t) for t in version.signature.inputs),
        outputs=tuple(_tensor(t) for t in version.signature.outputs),
        feature_names=tuple(version.signature.feature_names),
        feature_service=model.feature_service,
        predict=declared,
        rules=value_rules.rules_text(version.signature.rules),
        definitions=plan.definitions_hash,
    )


def _tensor(tensor: registry_pb2.TensorSpec) -> Tensor:
    return Tensor(name=tensor.name, datatype=tensor.datatype, shape=tuple(tensor.shape))


def rollout_record(bundle: Bundle) -> registry_pb2.RecordRolloutRequest:
    """The link from a version to the evidence of its rollout."""
    said = json.loads(bundle.text)
    record = registry_pb2.RolloutRecord(
        deployment=said["deployment"],
        decision=said["decision"],
        against=said["against"],
        evidence_sha256=bundle.sha256,
        evidence_size_bytes=len(bundle.text.encode()),
    )
    record.ended_at.FromDatetime(datetime.fromisoformat(said["ended_at"]))
    return registry_pb2.RecordRolloutRequest(model=said["model"], version=said["version"], rollout=record, actor=ACTOR)


def gateway_counts(answer: prediction_pb2.GetFiguresResponse, model: str) -> dict[str, Counts]:
    """One model's versions in a gateway's figures."""
    return {
        v.version: Counts(
            requests=v.requests,
            errors=v.errors,
            latency={repr(float(bucket.le_ms)): bucket.count for bucket in v.latency},
            shadow={each.segment: _pairs(each) for each in v.shadow},
        )
        for v in answer.versions
        if v.model == model
    }


def gateway_activity(answer: prediction_pb2.GetFiguresResponse, model: str) -> GatewayActivity:
    """How much one model's versions are used through a gateway."""
    used = {
        a.version: Used(started=a.started, running=a.running, held=a.held) for a in answer.activity if a.model == model
    }
    return GatewayActivity(answer.instance_id, used)


def _pairs(figures: prediction_pb2.ShadowFigures) -> Pairs:
    return Pairs(
        pairs=figures.pairs,
        flips=figures.label_flips,
        shift_sum=figures.shift_sum,
        shift_square_sum=figures.shift_square_sum,
        differences={
            each.tensor: {repr(float(bucket.le)): bucket.count for bucket in each.buckets}
            for each in figures.differences
        },
    )


def outcome_counts(answer: drift_pb2.GetOutcomesResponse, model: str) -> dict[str, Counts]:
    """One model's versions in the drift monitor's outcomes."""
    values: dict[str, dict[str, dict[str, Sums]]] = {}
    for each in answer.tracked:
        key = tracked_value(each.value).key
        for v in answer.versions:
            # What is tracked and has no value yet is known too.
            values.setdefault(v.version, {})[key] = {}
        for f in each.figures:
            by_segment = values.setdefault(f.version, {}).setdefault(key, {})
            by_segment[f.segment] = Sums(n=f.count, total=f.sum, square=f.square_sum)
    return {
        v.version: Counts(
            outcomes=v.outcomes,
            correct=v.correct,
            brier_sum=v.brier_sum,
            brier_square_sum=v.brier_square_sum,
            scores={str(one.bucket): one.count for one in v.scores},
            values=values.get(v.version, {}),
        )
        for v in answer.versions
        if v.model == model
    }


def tracked_value(message: drift_pb2.TrackedValue) -> Tracked:
    """A tracked value."""
    bounded = message.HasField("lower") and message.HasField("upper")
    lower, upper = (message.lower, message.upper) if bounded else (None, None)
    return Tracked(message.metric, lower, upper, message.segment)


def tracked_message(value: Tracked) -> drift_pb2.TrackedValue:
    """The other way."""
    return drift_pb2.TrackedValue(metric=value.metric, lower=value.lower, upper=value.upper, segment=value.segment)


def routes(table: Table) -> rollout_pb2.Routes:
    """The routes of every model."""
    return rollout_pb2.Routes(generation=table.generation, models=[_route(route) for route in table.routes])


def _route(route: Route) -> rollout_pb2.ModelRoute:
    return rollout_pb2.ModelRoute(
        model=route.model,
        arms=[_arm(arm) for arm in route.arms],
        sticky_header=route.sticky_header,
        rules=[rollout_pb2.Rule(when=rule.when, to=_role(rule.candidate)) for rule in route.rules],
        balancing=_BALANCING[route.balancing],
        timeout_ms=route.timeout_ms,
        feature_service=route.feature_service,
        feature_names=route.feature_names,
        input_tensor=route.input_tensor,
        output_tensor=route.output_tensor,
        input_datatype=route.input_datatype,
        input_shape=route.input_shape,
        segment_header=route.segment_header,
        hedge_after_ms=route.hedge_after_ms,
        callers=route.callers,
        testers=route.testers,
        may_sleep=route.may_sleep,
    )


def _role(candidate: bool) -> "rollout_pb2.ArmRole.ValueType":
    return rollout_pb2.ARM_ROLE_CANDIDATE if candidate else rollout_pb2.ARM_ROLE_STABLE


def _arm(arm: RouteArm) -> rollout_pb2.Arm:
    return rollout_pb2.Arm(
        version=arm.version,
        digest=arm.digest,
        # No role: a version that is leaving or kept, which no rule means.
        role=rollout_pb2.ARM_ROLE_UNSPECIFIED if arm.leaving else _role(arm.candidate),
        weight=arm.weight,
        endpoints=arm.endpoints,
        service=arm.service,
        server_version=arm.server_version,
        mirror_percent=arm.mirror,
        asleep=arm.asleep,
        predict=predict_plan.read_plan(arm.predict, "predict") if arm.predict else None,
        rules=value_rules.read_rules(arm.rules) if arm.rules else None,
    )


def deployment(row: Row, place: Place | None = None) -> rollout_pb2.Deployment:
    """A deployment as clients see it, with its place in a pool where it has one."""
    status, spec = row.status, manifest.parse(row.manifest).spec
    candidate = status.candidate.ref.version if status.candidate else ""
    return rollout_pb2.Deployment(
        name=row.name,
        manifest_yaml=row.manifest,
        generation=row.generation,
        observed_generation=status.observed_generation,
        model=row.model,
        stable_version=status.stable.ref.version if status.stable else "",
        candidate_version=candidate,
        candidate_weight=status.weight if candidate else 0.0,
        step=status.step,
        steps=len(stages(spec)),
        phase=status.phase,
        ready=is_ready(status),
        conditions=[
            rollout_pb2.Condition(
                type=c.type,
                status=c.status,
                reason=c.reason,
                message=c.message,
                last_transition_time=_time(c.last_transition_time),
            )
            for c in status.conditions
        ],
        gates=[_gate(gate) for gate in status.verdicts],
        events=[
            rollout_pb2.StatusEvent(at=_time(e.at), type=e.type, reason=e.reason, message=e.message)
            for e in status.events
        ],
        arms=[_arm(arm) for arm in status.route.arms] if status.route else [],
        created_at=_time(row.created_at),
        previous_version=status.previous_version,
        waiting=status.waiting,
        strategy=spec.rollout.strategy,
        comparisons=[_comparison(one) for one in status.comparisons],
        requests_per_second=row.evidence.rate,
        history=[decision(one, whole=False) for one in status.history],
        guarded_until=_time(until) if (until := guarded_until(spec, status)) is not None else "",
        pool=_place(place) if place is not None else None,
    )


def _place(place: Place) -> rollout_pb2.PoolPlace:
    return rollout_pb2.PoolPlace(
        pool=place.pool,
        versions=[
            rollout_pb2.PoolModel(
                version=member.name[1],
                state=member.state,
                memory_mib=member.size_bytes // MIB,
                waiting=place.waits.get(member.name, ""),
            )
            for member in place.versions
        ],
        capacity_mib=place.capacity_bytes // MIB,
        set_aside_mib=place.set_aside_bytes // MIB,
        resident=place.resident,
        waiting=place.waiting,
    )


def _gate(gate: GateView) -> rollout_pb2.GateResult:
    return rollout_pb2.GateResult(
        gate=gate.gate,
        verdict=_VERDICTS[gate.verdict],
        evidence=gate.evidence,
        candidate_samples=gate.candidate_samples,
        stable_samples=gate.stable_samples,
    )


def _comparison(one: ComparisonView) -> rollout_pb2.ComparisonResult:
    return rollout_pb2.ComparisonResult(
        metric=one.metric,
        candidate=one.candidate,
        stable=one.stable,
        candidate_samples=one.candidate_samples,
        stable_samples=one.stable_samples,
        lower=one.lower,
        upper=one.upper,
        confidence=one.confidence,
        better=one.better,
        segment=one.segment,
        evidence=one.evidence,
    )


def decision(one: Decision, *, whole: bool = True) -> rollout_pb2.Decision:
    """A decision; with `whole` also the evidence behind it."""
    return rollout_pb2.Decision(
        at=_time(one.at),
        revision=one.revision,
        version=one.version,
        against=one.against,
        decision=one.decision,
        message=one.message,
        weight=one.weight,
        gates=[_gate(gate) for gate in one.gates] if whole else (),
        comparisons=[_comparison(result) for result in one.comparisons] if whole else (),
        bundle_sha256=one.bundle,
    )


def _time(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
