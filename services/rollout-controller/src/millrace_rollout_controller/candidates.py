"""Which version is on trial: chosen, admitted, sent away. Pure; part of the reconciler."""

from millrace_kit.cel_nodes import attribute_nodes
from millrace_kit.cel_rules import check_rule

from millrace_rollout_controller.history import record
from millrace_rollout_controller.plans import Draft, Refusal
from millrace_rollout_controller.state import Arm, Failed, Retiring, VersionRef


def accept_spec(d: Draft) -> None:
    """Take note of a new generation; a changed rollout starts over."""
    s = d.status
    if d.item.generation == s.observed_generation:
        return
    key = d.spec.version + d.spec.rollout.model_dump_json()
    s.failed, s.aborted, s.forced = None, False, False
    if s.undo and s.undo != d.spec.version:
        s.undo = ""
    if key != s.rollout_key:
        s.paused, s.resumed_step = False, -1
        if s.candidate is not None and s.candidate.ref.version == d.spec.version:
            start_trial(d)
            s.event(d.now, "Normal", "RolloutChanged", f"steps of {d.spec.version} start over: the rollout was changed")
    s.rollout_key = key
    s.observed_generation = d.item.generation
    s.event(d.now, "Normal", "SpecAccepted", f"generation {d.item.generation} wants version {d.spec.version}")
    if s.stable is not None:
        # Every version of the model has the same.
        _warn_of_features(d, s.stable.ref)


def start_trial(d: Draft) -> None:
    """Nothing is known of the candidate yet."""
    s = d.status
    s.trial += 1
    s.step, s.weight, s.mirror, s.entered, s.held_weight = 0, 0.0, 0.0, False, None
    s.capacity_weight, s.stable_servers = 0.0, 0
    s.step_since, s.unready_since, s.gates, s.comparisons = None, None, [], []
    s.warmup, s.warmup_over, s.warmup_waived = None, False, False
    s.mismatch = ""
    s.candidate_since, s.forced, s.resumed_step, s.guarding = d.now, False, -1, False


def choose_candidate(d: Draft) -> None:
    """Put the wanted version on trial when it is not the stable one and has not failed."""
    s, target = d.status, d.spec.version
    if s.aborted:
        s.aborted = False
        if s.candidate is not None:
            fail(d, "Aborted", "a person ended the rollout")
    if s.guarding and s.stable is not None and target not in {s.stable.ref.version, _wanted_now(d)}:
        # It had its promotion; the next version is compared with it, and the window ends early.
        s.forced = True
        return
    if s.candidate is not None and s.candidate.ref.version != target:
        version = s.candidate.ref.version
        send_away(d)
        s.event(d.now, "Normal", "Superseded", f"{version} gives way: the spec now wants {target}")
    if s.stable is not None and s.stable.ref.version == target:
        s.undo = ""
    if s.candidate is not None or (s.stable and s.stable.ref.version == target) or s.failed is not None:
        return
    # A version that still has servers is known; going back to it needs no registry.
    known = next((gone.ref for gone in s.retiring if gone.ref.version == target), None)
    match known or d.seen.versions.get(target):
        case None:
            s.phase, s.waiting = "Preparing", "waiting for the registry"
        case Refusal(reason=reason, message=message, permanent=permanent):
            s.phase, s.waiting = "Preparing", message
            s.event(d.now, "Warning", reason, message)
            if permanent:
                s.failed = Failed(version=target, reason=reason, message=message)
        case VersionRef() as ref:
            _admit(d, ref)


def _wanted_now(d: Draft) -> str:
    return d.status.candidate.ref.version if d.status.candidate is not None else ""


def _admit(d: Draft, ref: VersionRef) -> None:
    s = d.status
    if s.stable is not None and s.stable.ref.signature != ref.signature:
        message = f"{ref.version} has another signature than {s.stable.ref.version}; callers would have to change"
        s.failed = Failed(version=ref.version, reason="SignatureChanged", message=message)
        s.event(d.now, "Warning", "SignatureChanged", message)
        return
    if s.stable is not None and _other_definitions(s.stable.ref, ref):
        message = f"{ref.version} declares other feature definitions than {s.stable.ref.version}, and features are read before the split"
        s.failed = Failed(version=ref.version, reason="DefinitionsChanged", message=message)
        s.event(d.now, "Warning", "DefinitionsChanged", message)
        return
    if s.stable is None:
        _warn_of_features(d, ref)
    # One that was on its way out of a pool and is wanted again keeps its place.
    placed = next((gone.placed for gone in s.retiring if gone.ref.version == ref.version), None)
    s.retiring = [gone for gone in s.retiring if gone.ref.version != ref.version]
    seen = d.servers(ref.version)
    s.candidate = Arm(ref=ref, endpoints=seen.ready, service=seen.service, placed=placed)
    start_trial(d)
    s.phase, s.waiting = "Preparing", "servers start"
    s.event(
        d.now, "Normal", "CandidateChosen", f"{ref.version} ({ref.digest[:12]}) gets {d.spec.server.replicas} servers"
    )


def _warn_of_features(d: Draft, ref: VersionRef) -> None:
    """Say which features the rules read and the model does not have: such a test never holds."""
    nodes = (node for rule in d.spec.routing.rules for node in attribute_nodes(check_rule(rule.when, "when")))
    unknown = {node.name for node in nodes if node.source == "features"} - set(ref.feature_names)
    if unknown:
        message = f"rules read features that {ref.version} does not have: {', '.join(sorted(unknown))}"
        d.status.event(d.now, "Warning", "UnknownFeature", message)


def _other_definitions(stable: VersionRef, ref: VersionRef) -> bool:
    return bool(stable.definitions and ref.definitions) and stable.definitions != ref.definitions


def fail(d: Draft, reason: str, message: str) -> None:
    """The candidate has failed: all traffic to stable at once, and this version is not tried again."""
    s = d.status
    if s.candidate is None:
        return
    version = s.candidate.ref.version
    s.failed = Failed(version=version, reason=reason, message=message)
    s.event(d.now, "Warning", reason, f"{version}: {message}")
    record(d, reason, message, finished=True)
    send_away(d)
    if s.stable is not None:
        s.phase = "RollingBack"
        s.event(d.now, "Warning", "RollingBack", f"all traffic goes back to {s.stable.ref.version}")


def send_away(d: Draft) -> None:
    """The candidate loses its weight and begins to retire."""
    s = d.status
    if s.candidate is None:
        return
    gone = s.candidate
    leaving = Retiring(
        ref=gone.ref, endpoints=gone.endpoints, served=gone.served, service=gone.service, placed=gone.placed
    )
    s.retiring = [*s.retiring, leaving]
    s.candidate, s.weight, s.mirror, s.entered, s.held_weight = None, 0.0, 0.0, False, None
    s.step_since, s.forced, s.unready_since, s.undo, s.guarding = None, False, None, "", False
