"""The wanted route of a model, from a deployment's spec and status. Pure."""

from millrace_rollout_controller import server_versions
from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.sleeping import idle_after
from millrace_rollout_controller.state import Arm, Retiring, Route, RouteArm, RouteRule, Status


def wanted_route(spec: Spec, status: Status, *, candidate_ready: bool) -> Route | None:
    """The route that should be in force; None while no version can serve.

    Weights add up to 100. A candidate without a ready server gets 0, whatever its step says, and no copies. Versions on their way out or
    kept for undo stay in the route with weight 0; no rule means them. Rules to the candidate begin with its first stage.
    """
    stable, candidate = status.stable, status.candidate
    if stable is None:
        return None
    on_trial = candidate is not None and status.entered and candidate_ready
    weight = status.weight if on_trial else 0.0
    shared = spec.server.holds_several
    arms = [_arm(stable, 100.0 - weight)]
    if candidate is not None and (candidate.endpoints or candidate.sleep is not None):
        arms.append(_arm(candidate, weight, candidate=True, mirror=status.mirror if on_trial else 0.0))
    arms += [_arm(gone, 0.0, candidate=True, leaving=True) for gone in status.retiring if _stays(gone)]
    ref = stable.ref
    sticky = spec.routing.sticky
    return Route(
        model=spec.model,
        arms=tuple(_numbered(arm) for arm in arms) if shared else tuple(arms),
        sticky_header=sticky.header if sticky else "",
        rules=tuple(
            RouteRule(when=rule.when, candidate=rule.to == "candidate")
            for rule in spec.routing.rules
            if rule.to == "stable" or on_trial
        ),
        balancing=spec.balancing,
        timeout_ms=spec.server.timeout_ms,
        feature_service=ref.feature_service,
        feature_names=ref.feature_names,
        input_tensor=ref.inputs[0].name if len(ref.inputs) == 1 else "",
        input_datatype=ref.inputs[0].datatype if len(ref.inputs) == 1 else "",
        input_shape=ref.inputs[0].shape if len(ref.inputs) == 1 else (),
        output_tensor=ref.outputs[0].name if ref.outputs else "",
        segment_header=shadow.segment.header if (shadow := spec.rollout.shadow) and shadow.segment else "",
        hedge_after_ms=spec.routing.hedge_after_ms or 0,
        callers=spec.routing.callers or (),
        testers=spec.routing.testers or (),
        may_sleep=idle_after(spec) is not None or spec.server.pool is not None,
    )


def _numbered(arm: RouteArm) -> RouteArm:
    return arm.model_copy(update={"server_version": server_versions.number(arm.version)})


def _stays(gone: Retiring) -> bool:
    return not gone.removed and bool(gone.endpoints)


def _arm(
    arm: Arm | Retiring, weight: float, *, candidate: bool = False, mirror: float = 0.0, leaving: bool = False
) -> RouteArm:
    asleep = isinstance(arm, Arm) and arm.sleep is not None
    return RouteArm(
        version=arm.ref.version,
        digest=arm.ref.digest,
        candidate=candidate,
        weight=weight,
        endpoints=() if asleep else arm.endpoints,
        asleep=asleep,
        service=arm.service,
        mirror=mirror,
        leaving=leaving,
        predict=arm.ref.predict,
        rules=arm.ref.rules,
    )
