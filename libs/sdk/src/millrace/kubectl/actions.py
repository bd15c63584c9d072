"""What a person asks of a ModelDeployment: one patch with the annotation `millrace.dev/action`, then the controller's answer to it.

The annotation is `<verb> [<weight>] <nonce>`; the controller does each nonce once and answers in `status.lastAction`, so an answer that is
seen belongs to this very request.
"""

import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import grpc
from millrace_kit.errors import MillraceError

from millrace.kubectl.cluster import Cluster, ClusterError, Object

ANNOTATION = "millrace.dev/action"
ANSWER_TIMEOUT_S = 30.0
POLL_S = 0.2
GONE = 410


class ActionRefusedError(MillraceError):
    """The controller will not do it; the message is its own."""

    def __init__(self, verb: str, message: str) -> None:
        super().__init__(grpc.StatusCode.FAILED_PRECONDITION, "ACTION_REFUSED", message, {"verb": verb})


class NoAnswerError(MillraceError):
    """Nobody answered in time; the request stands, and is done when a controller comes back."""

    def __init__(self, verb: str, timeout_s: float) -> None:
        message = f"the controller did not answer within {timeout_s:g} s; {verb} is done when it is back"
        super().__init__(grpc.StatusCode.DEADLINE_EXCEEDED, "NO_ANSWER", message, {"verb": verb})


def patch(verb: str, nonce: str, weight: float | None = None, version: str = "") -> Object:
    """The merge patch; `version` becomes the wanted one in the same patch (undo)."""
    words = [verb, *([f"{weight:g}"] if weight is not None else []), nonce]
    body: Object = {"metadata": {"annotations": {ANNOTATION: " ".join(words)}}}
    if version:
        body["spec"] = {"version": version}
    return body


def answer(item: Object, nonce: str) -> Object | None:
    """The controller's answer to this nonce, when it is there."""
    last: Any = (item.get("status") or {}).get("lastAction")
    return last if last and last.get("id") == nonce else None


def act(
    cluster: Cluster,
    name: str,
    verb: str,
    weight: float | None = None,
    *,
    to: str = "",
    timeout_s: float = ANSWER_TIMEOUT_S,
    nonce: Callable[[], str] = lambda: uuid4().hex[:12],
) -> Object:
    """Ask, and wait for the answer; the ModelDeployment as it is then. `to` is the version or revision that `undo` goes back to.

    Raises:
        ActionRefusedError: the controller said no.
        NoAnswerError: it said nothing in time.
        ClusterError: the API server refused, or was not reached.
    """
    version = ""
    if verb == "undo":
        # The resource version makes it one change: nobody can promote another version in between.
        item = cluster.deployment(name)
        version = _target(item.get("status") or {}, to)
        if not version and to:
            raise ActionRefusedError(verb, f"{to!r} is no version or revision in the history of {name} that was stable")
        if not version:
            raise ActionRefusedError(verb, f"no version of {name} was stable before this one")
    asked = nonce()
    body = patch(verb, asked, weight, version)
    if version:
        body["metadata"]["resourceVersion"] = item["metadata"]["resourceVersion"]
    item = cluster.merge(name, body)
    deadline = time.monotonic() + timeout_s
    while (found := answer(item, asked)) is None:
        if time.monotonic() > deadline:
            raise NoAnswerError(verb, timeout_s)
        time.sleep(POLL_S)
        item = cluster.deployment(name)
        _check_mine(item, asked, verb)
    if found.get("result") != "Done":
        raise ActionRefusedError(verb, found.get("message") or "the controller refused")
    return item


def _target(status: Object, to: str) -> str:
    """The version that undo goes back to; empty when there is none."""
    previous = str(status.get("previousVersion", ""))
    if not to:
        return previous
    stable = {str(one["revision"]): str(one["version"]) for one in status.get("history", ()) if one.get("revision")}
    return to if to in {*stable.values(), previous} else stable.get(to, "")


def _check_mine(item: Object, asked: str, verb: str) -> None:
    """An annotation of somebody else that came after this one, unanswered, means this one may never be read."""
    present = (item["metadata"].get("annotations") or {}).get(ANNOTATION, "")
    if asked not in present and answer(item, asked) is None:
        raise ActionRefusedError(verb, f"somebody else asked for something else at the same time ({present!r})")


def retry_conflicts(ask: Callable[[], Object], attempts: int = 5) -> Object:
    """Ask again when somebody changed the object in between."""
    for left in reversed(range(attempts)):
        try:
            return ask()
        except ClusterError as error:
            if error.status != 409 or not left:
                raise
    raise AssertionError("unreachable")
