"""The wanted route of a model, from a deployment's spec and status. Pure."""

from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.state import Route, RouteArm, RouteRule, Status


def wanted_route(spec: Spec, status: Status, *, candidate_ready: bool) -> Route | None:
    """The route that should be in force; None while no version can serve.

    Weights add up to 100. A candidate without a ready server gets 0, whatever its step says. Versions on their way out stay in the
    route with weight 0 until they are drained; they carry the candidate's role so that "stable" names one arm, and rules to the
    candidate are left out unless they can only mean the candidate on trial.
    """
    stable = status.stable
    if stable is None:
        return None
    arms: list[RouteArm] = []
    candidate = status.candidate
    weight = status.weight if candidate is not None and candidate_ready else 0.0
    arms.append(_arm(stable.ref.version, stable.ref.digest, stable.endpoints, 100.0 - weight, candidate=False))
    if candidate is not None and candidate.endpoints:
        ref = candidate.ref
        arms.append(_arm(ref.version, ref.digest, candidate.endpoints, weight, candidate=True))
    leaving = [gone for gone in status.retiring if not gone.removed and gone.endpoints]
    arms += [_arm(gone.ref.version, gone.ref.digest, gone.endpoints, 0.0, candidate=True) for gone in leaving]
    meant = candidate is not None and weight > 0 and not leaving
    ref = stable.ref
    sticky = spec.routing.sticky
    return Route(
        model=spec.model,
        arms=tuple(arms),
        sticky_header=sticky.header if sticky else "",
        rules=tuple(
            RouteRule(when=rule.when, candidate=rule.to == "candidate")
            for rule in spec.routing.rules
            if rule.to == "stable" or meant
        ),
        round_robin=spec.balancing == "RoundRobin",
        timeout_ms=spec.server.timeout_ms,
        feature_service=ref.feature_service,
        feature_names=ref.feature_names,
        input_tensor=ref.inputs[0].name if len(ref.inputs) == 1 else "",
        output_tensor=ref.outputs[0].name if ref.outputs else "",
    )


def _arm(version: str, digest: str, endpoints: tuple[str, ...], weight: float, *, candidate: bool) -> RouteArm:
    return RouteArm(version=version, digest=digest, candidate=candidate, weight=weight, endpoints=endpoints)
