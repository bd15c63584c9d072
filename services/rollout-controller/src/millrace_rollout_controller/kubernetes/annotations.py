"""What a person asks by the annotation `millrace.dev/action: "<verb> [<weight>] <nonce>"`: done once per nonce, and answered in the status. Pure."""

import re
from dataclasses import dataclass
from datetime import datetime

from millrace_rollout_controller import actions
from millrace_rollout_controller.actions import Refused, Verb
from millrace_rollout_controller.history import once_stable
from millrace_rollout_controller.kubernetes import names
from millrace_rollout_controller.kubernetes.api import Object
from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.state import Status

_FORM = re.compile(r"\s*([a-z-]{1,20})(?:\s+(\d{1,3}(?:\.\d{1,6})?))?\s+(\S{1,64})\s*")
MAX_TEXT = 128


@dataclass(frozen=True, slots=True)
class Asked:
    """One annotation, read."""

    text: str
    nonce: str
    verb: str = ""
    weight: float | None = None
    problem: str = ""


def unanswered(item: Object) -> Asked | None:
    """The annotation, when its nonce is not the one answered last."""
    text = item["metadata"].get("annotations", {}).get(names.ACTION_ANNOTATION, "")
    if not text:
        return None
    last = (item.get("status") or {}).get("lastAction") or {}
    asked = read(text)
    return None if last.get("id") == asked.nonce else asked


def read(text: str) -> Asked:
    """Verb, weight and nonce; what cannot be read is its own nonce, so that it is answered once as well."""
    match = _FORM.fullmatch(text)
    if match is None:
        return Asked(text[:MAX_TEXT], text[:64], problem='needs the form "<verb> [<weight>] <nonce>"')
    verb, weight, nonce = match.groups()
    if verb not in actions.VERBS:
        return Asked(text, nonce, verb, problem=f"the verb must be one of {', '.join(actions.VERBS)}")
    return Asked(text, nonce, verb, float(weight) if weight is not None else None)


def perform(asked: Asked, spec: Spec, status: Status, now: datetime) -> tuple[Status, Object]:
    """The status with what was asked, and the record for `status.lastAction`."""
    if asked.problem:
        return status, _record(asked, "Refused", asked.problem, now)
    verb: Verb = asked.verb  # type: ignore[assignment]
    # The patch that asks for an undo names its target as spec.version.
    to = spec.version if verb == "undo" and once_stable(status, spec.version) == spec.version else ""
    if status.stable is not None and to == status.stable.ref.version:
        to = ""
    found = actions.act(spec, status, verb, asked.weight, now, to=to)
    if isinstance(found, Refused):
        text = f"{found.field}: {found.message}" if found.field else found.message
        return status, _record(asked, "Refused", text, now)
    if verb == "undo" and spec.version != found.undo:
        text = f"spec.version must be {found.undo} in the same patch"
        return status, _record(asked, "Refused", text, now)
    return found, _record(asked, "Done", "", now)


def _record(asked: Asked, result: str, message: str, now: datetime) -> Object:
    at = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    record: Object = {"id": asked.nonce, "verb": asked.verb, "result": result, "message": message[:1000], "at": at}
    return record | ({"weight": asked.weight} if asked.weight is not None else {})
