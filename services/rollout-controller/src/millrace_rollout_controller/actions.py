"""What a person may ask of a deployment: promote, pause, resume, abort, undo, set-weight. Pure.

The same code serves the gRPC verbs and the annotation in a cluster. It only leaves marks in the status; the reconciler acts on them.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

import yaml

from millrace_rollout_controller.history import once_stable
from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.state import Status

Verb = Literal["promote", "pause", "resume", "abort", "undo", "set-weight"]
VERBS: tuple[Verb, ...] = get_args(Verb)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why the verb cannot be done now."""

    reason: str
    """UPPER_SNAKE."""
    message: str
    field: str = ""
    """Field of the request that is wrong; empty when the state is what does not fit."""


def act(
    spec: Spec, status: Status, verb: Verb, weight: float | None, now: datetime, *, to: str = ""
) -> Status | Refused:
    """The status with the person's mark, or why not; the arguments are left as they are.

    Args:
        spec: what is wanted. For `undo` it may name the previous version already.
        status: where the deployment stands.
        verb: what is asked.
        weight: percent, for `set-weight` only.
        now: for the event that says so.
        to: of `undo`: version or revision to go back to; empty is the one before.

    After `undo` the spec has to name `status.undo`; who keeps the manifest changes it in the same transaction.
    """
    if (weight is not None) != (verb == "set-weight"):
        return Refused("INVALID_ARGUMENT", "belongs to set-weight, and set-weight needs it", "weight")
    after = status.model_copy(deep=True)
    if verb == "undo":
        refused = _undo(after, to)
    elif status.candidate is None:
        hint = "; undo goes back to " + status.previous_version if verb == "abort" and status.previous_version else ""
        refused = Refused("NO_ROLLOUT", f"no rollout is under way (phase {status.phase}){hint}")
    else:
        refused = _on_trial(spec, after, verb, weight)
    if refused is not None:
        return refused
    words = f"{verb} {weight:g}" if weight is not None else f"{verb} to {after.undo}" if verb == "undo" else verb
    after.event(now, "Normal", "PersonActed", f"a person asked: {words}")
    return after


def _undo(s: Status, to: str) -> Refused | None:
    previous = once_stable(s, to) if to else s.previous_version
    if to and not previous:
        return Refused(
            "INVALID_ARGUMENT", f"{to[:100]!r} is no version or revision in the history that was stable", "to"
        )
    if not previous or s.stable is None:
        return Refused("NO_PREVIOUS_VERSION", "no version was stable before this one")
    if s.candidate is None and previous == s.stable.ref.version:
        return Refused("ALREADY_STABLE", f"{previous} is the stable version")
    if s.candidate is not None and s.candidate.ref.version != previous:
        version = s.candidate.ref.version
        return Refused("ROLLOUT_UNDER_WAY", f"the rollout of {version} is under way; abort ends it")
    s.undo, s.paused, s.held_weight = previous, False, None
    if s.candidate is not None and s.entered:
        s.forced = True
    if s.failed is not None and s.failed.version == previous:
        s.failed = None
    return None


def _on_trial(spec: Spec, s: Status, verb: Verb, weight: float | None) -> Refused | None:
    match verb:
        case "promote":
            if s.stable is not None and not s.entered:
                return _not_ready(s)
            s.forced, s.paused, s.held_weight = True, False, None
        case "pause":
            s.paused = True
        case "resume":
            s.paused, s.held_weight, s.resumed_step = False, None, s.step
            s.warmup_waived = s.warmup_waived or s.warmup_over
        case "abort":
            if s.stable is None:
                message = "there is no stable version to go back to; delete the deployment instead"
                return Refused("NO_STABLE_VERSION", message)
            s.aborted = True
        case "set-weight":
            return _set_weight(spec, s, weight or 0.0)
    return None


def _set_weight(spec: Spec, s: Status, weight: float) -> Refused | None:
    if not 0 <= weight <= 100 or round(weight, 2) != weight:
        return Refused("INVALID_ARGUMENT", "must be 0 to 100 with at most two decimals", "weight")
    strategy = spec.rollout.strategy
    if strategy in {"BlueGreen", "Shadow"}:
        return Refused("NOT_OF_THIS_STRATEGY", f"{strategy} knows no weight between none and all; use promote or abort")
    if s.stable is None or not s.entered:
        return _not_ready(s)
    s.held_weight, s.forced = weight, False
    return None


def _not_ready(s: Status) -> Refused:
    version = s.candidate.ref.version if s.candidate is not None else ""
    return Refused("CANDIDATE_NOT_READY", f"{version} has no traffic yet; its servers are not ready")


def with_version(manifest_text: str, version: str) -> str:
    """The manifest with another `spec.version`, otherwise as its author wrote it, comments too."""
    node = yaml.compose(manifest_text, yaml.SafeLoader)
    for name in ("spec", "version"):
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"nothing can hold {name}")  # noqa: TRY004 - the text is wrong, not its type
        node = next(value for key, value in node.value if key.value == name)
    assert node is not None
    # JSON needs the quotes, and YAML allows them.
    return f'{manifest_text[: node.start_mark.index]}"{version}"{manifest_text[node.end_mark.index :]}'
