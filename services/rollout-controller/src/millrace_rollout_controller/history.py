"""What was decided, with the evidence behind it: the status keeps the newest decisions, the registry one bundle for every finished rollout. Pure.

A bundle is named by its content before it is sent, so the decision can name it at once; `Status.unsent` holds it until the registry has it.
"""

import hashlib
import json

from millrace_rollout_controller.plans import Draft
from millrace_rollout_controller.state import Bundle, Decision, Status

MAX_HISTORY = 30
MAX_UNSENT = 5
"""Bundles that wait for the registry; the oldest is given up for a newer one."""
FORMAT = "millrace.rollout-evidence/1"


def record(d: Draft, decision: str, message: str, *, stable: bool = False, finished: bool = False) -> None:
    """Note a decision about the candidate, with the gates and comparisons as they are now.

    Args:
        d: the look; its candidate is still there.
        decision: one word.
        message: for people.
        stable: the candidate becomes the stable version.
        finished: the rollout is over, one way or the other.
    """
    s = d.status
    if s.candidate is None:
        return
    s.revision += stable
    made = Decision(
        at=d.now,
        revision=s.revision if stable else 0,
        version=s.candidate.ref.version,
        against=s.stable.ref.version if s.stable is not None else "",
        decision=decision,
        message=message,
        weight=s.weight,
        gates=tuple(s.gates),
        comparisons=tuple(s.comparisons),
    )
    if finished:
        text = _bundle(d, made)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        made = made.model_copy(update={"bundle": sha256})
        s.unsent = [*s.unsent, Bundle(sha256=sha256, text=text)][-MAX_UNSENT:]
    s.history = [*s.history, made][-MAX_HISTORY:]


def _bundle(d: Draft, last: Decision) -> str:
    """Everything about one rollout as JSON, the same text for the same rollout."""
    s, since = d.status, d.status.candidate_since
    mine = [one for one in s.history if one.version == last.version and (since is None or one.at >= since)]
    known = d.evidence.trial == s.trial
    content = {
        "format": FORMAT,
        "deployment": d.item.name,
        "generation": d.item.generation,
        "model": d.spec.model,
        "version": last.version,
        "digest": s.candidate.ref.digest if s.candidate is not None else "",
        "against": last.against,
        "against_digest": s.stable.ref.digest if s.stable is not None else "",
        "decision": last.decision,
        "message": last.message,
        "began_at": since.isoformat() if since is not None else "",
        "ended_at": d.now.isoformat(),
        "rollout": d.spec.rollout.model_dump(mode="json", by_alias=True, exclude_none=True),
        "decisions": [one.model_dump(mode="json") for one in (*mine, last)],
        "figures": {
            "candidate": d.evidence.candidate.model_dump(mode="json") if known else {},
            "stable": d.evidence.stable.model_dump(mode="json") if known else {},
        },
    }
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def once_stable(status: Status, to: str) -> str:
    """The version that `to` names, a version or a revision that was stable once; empty when none was."""
    found = {str(one.revision): one.version for one in status.history if one.revision}
    versions = {*found.values(), status.previous_version} - {""}
    return to if to in versions else found.get(to, "")
