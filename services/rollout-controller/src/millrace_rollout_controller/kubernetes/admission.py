"""Which of the objects in the cluster are deployments in force. Pure.

The CRD refuses most of what is wrong before it is stored. What is left is what one object cannot say about another (one deployment per
model, how many there may be), what CEL cannot say, and objects from before the CRD was upgraded.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from millrace_kit.errors import InvalidArgumentError

from millrace_rollout_controller import manifest
from millrace_rollout_controller.kubernetes.api import Object
from millrace_rollout_controller.kubernetes.public_status import FORMAT, Internal, Problem, internal_of, manifest_text


@dataclass(frozen=True, slots=True)
class Admitted:
    """One object, read."""

    item: Object
    manifest_text: str = ""
    """The manifest in force: the object's own, or the last good one. Empty when there never was one."""
    spec: manifest.Spec | None = None
    generation: int = 0
    """Of the manifest in force."""
    internal: Internal | None = None
    problem: Problem | None = None
    """Why the object's own manifest is not in force."""


Checker = Callable[[manifest.Spec], None]


def read(item: Object, check: Checker) -> Admitted:
    """One object by itself."""
    text, generation = manifest_text(item), item["metadata"]["generation"]
    try:
        internal = internal_of(item)
    except ValueError as error:
        return Admitted(item, problem=Problem("status.internal", str(error)[:500], "StatusUnreadable"))
    if internal.format > FORMAT:
        why = f"was written by a newer controller (format {internal.format}); this one knows {FORMAT}"
        return Admitted(item, problem=Problem("status.internal", why, "StatusUnreadable"))
    try:
        spec = manifest.parse(text).spec
        check(spec)
    except InvalidArgumentError as error:
        message = error.message.removeprefix(f"{error.field}: ")
        return _last_good(item, internal, Problem(error.field, message))
    return Admitted(item, text, spec, generation, internal)


def _last_good(item: Object, internal: Internal, problem: Problem) -> Admitted:
    if internal.manifest:
        spec = manifest.parse(internal.manifest).spec
        return Admitted(item, internal.manifest, spec, internal.generation, internal, problem)
    return Admitted(item, internal=internal, problem=problem)


def together(found: Iterable[Admitted], limit: int) -> dict[str, Admitted]:
    """All objects beside each other: the older one has the model, and at most `limit` are taken."""
    result: dict[str, Admitted] = {}
    taken: dict[str, str] = {}
    for one in sorted(found, key=_age):
        name = one.item["metadata"]["name"]
        result[name] = one
        if one.spec is None:
            continue
        owner = taken.get(one.spec.model)
        if owner is not None:
            message = f"model {one.spec.model!r} belongs to ModelDeployment {owner!r}"
            result[name] = Admitted(
                one.item, internal=one.internal, problem=Problem("spec.model", message, "ModelTaken")
            )
        elif len(taken) >= limit:
            message = f"{limit} ModelDeployments are the most this controller takes (max_deployments)"
            result[name] = Admitted(one.item, internal=one.internal, problem=Problem("metadata", message, "TooMany"))
        else:
            taken[one.spec.model] = name
    return result


def _age(one: Admitted) -> tuple[bool, str, str]:
    """Who is served already keeps its model; then the older one."""
    metadata = one.item["metadata"]
    served = one.internal is not None and bool(one.internal.state)
    return not served, metadata.get("creationTimestamp", ""), metadata["name"]


def spec_of(text: str) -> Mapping[str, object]:
    """The spec of a manifest's text as plain values."""
    from millrace_rollout_controller import documents

    found: Mapping[str, object] = json.loads(documents.to_json(text, "manifest_yaml"))["spec"]
    return found
