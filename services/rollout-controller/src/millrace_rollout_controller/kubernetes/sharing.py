"""Servers that hold all versions of a deployment: what they should hold, and what that makes of each version. Pure.

A version is kept in the orders while somebody wants it or a gateway may still send calls for it; the first one is stable's. It has the
ready pods whose loaders say that they hold it, so a route names it only where it is.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from pydantic import ValidationError

from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.kubernetes import names
from millrace_rollout_controller.kubernetes.api import Object
from millrace_rollout_controller.kubernetes.containers import order_of
from millrace_rollout_controller.kubernetes.loaders import Held, Loaders, Told
from millrace_rollout_controller.kubernetes.observing import Pods, host
from millrace_rollout_controller.kubernetes.order import MAX_VERSIONS, ORDERS_FILE, Orders
from millrace_rollout_controller.kubernetes.settings import ModelServerSettings
from millrace_rollout_controller.plans import ArmSeen, Refusal


@dataclass(frozen=True, slots=True)
class Group:
    """All versions of one deployment, in the same servers."""

    want: Wanted
    """The servers: named `names.SHARED`, as many as the version that wants most."""
    versions: tuple[Wanted, ...]
    """Stable first."""


@dataclass(frozen=True, slots=True)
class InPod:
    """What one pod of several versions says."""

    name: str
    held: Mapping[str, Held] = field(default_factory=dict)
    trouble: str = ""
    """Why its loader does not answer."""


def apart(wanted: Iterable[Wanted]) -> tuple[list[Wanted], list[Group]]:
    """Versions with servers of their own, and those that share them."""
    own: list[Wanted] = []
    shared: list[Wanted] = []
    for want in wanted:
        (shared if want.server.placement == "Shared" else own).append(want)
    return own, [_group(tuple(versions)) for _, versions in groupby(shared, lambda want: want.deployment)]


def _group(versions: tuple[Wanted, ...]) -> Group:
    first = versions[0]
    ref = first.ref.model_copy(update={"version": names.SHARED})
    return Group(replace(first, ref=ref, replicas=max(want.replicas for want in versions)), versions)


def orders(
    group: Group, before: Orders | None, in_use: Collection[str] | None, servers: ModelServerSettings, now_ms: int
) -> Orders:
    """What the servers should hold from now on; `before` itself while nothing changes.

    Args:
        group: what is wanted.
        before: what they should hold so far.
        in_use: versions that a gateway may still send calls for; None when that is unknown.
        servers: defaults of the pods.
        now_ms: a revision made of it is newer than one that was lost.
    """
    wanted = {want.ref.version: order_of(want, servers) for want in group.versions}
    leaving = [one for one in (before.versions if before else ()) if one.ref.version not in wanted]
    kept = [one for one in leaving if in_use is None or one.ref.version in in_use]
    versions = (*wanted.values(), *kept)[:MAX_VERSIONS]
    if before is not None and before.versions == versions:
        return before
    return Orders(revision=max(now_ms, before.revision + 1 if before else 0), versions=versions)


def in_use_inside(pods: Iterable[Object], in_use: Collection[str] | None) -> frozenset[str] | None:
    """Versions for which a gateway may still send calls to these pods.

    Args:
        pods: of one deployment.
        in_use: as `Executor.converge` is told: beside endpoints `endpoint/…/version` of those that hold several.
    """
    if in_use is None:
        return None
    here = {f"{host(ip)}:{names.GRPC}" for pod in pods if (ip := pod.get("status", {}).get("podIP"))}
    places = (place.split("/") for place in in_use if "/" in place)
    return frozenset(parts[-1] for parts in places if parts[0] in here)


def stored(item: Object | None) -> Orders | None:
    """The orders in a ConfigMap; None of one that is not there or that somebody spoiled."""
    try:
        return Orders.model_validate_json((item or {}).get("data", {}).get(ORDERS_FILE, ""))
    except ValidationError:
        return None


def told(pods: Mapping[str, Object], stored_orders: Mapping[str, Object]) -> dict[str, Told]:
    """What is told to whom, by pod: what is stored, so that a pod that starts meanwhile reads nothing older."""
    found = {}
    for name, pod in pods.items():
        metadata, address = pod["metadata"], pod.get("status", {}).get("podIP", "")
        shared = metadata.get("annotations", {}).get(names.VERSION_ANNOTATION) == names.SHARED
        if not shared or not address or metadata.get("deletionTimestamp"):
            continue
        deployment = metadata.get("labels", {}).get(names.DEPLOYMENT_LABEL, "")
        item = stored_orders.get(names.object_name(deployment, names.SHARED))
        document = (item or {}).get("data", {}).get(ORDERS_FILE, "")
        found[name] = Told(metadata.get("uid", ""), address_of(pod), document if stored(item) else "")
    return found


def inside(pods: Iterable[Object], loaders: Loaders) -> list[InPod]:
    """What pods say, but those on their way out. That a loader does not answer is news only once it runs."""
    found = []
    for pod in pods:
        name = pod["metadata"]["name"]
        if pod["metadata"].get("deletionTimestamp"):
            continue
        statuses = pod.get("status", {}).get("containerStatuses") or ()
        runs = any(one["name"] == "loader" and "running" in one.get("state", {}) for one in statuses)
        found.append(InPod(name, loaders.held(name), loaders.trouble(name) if runs else ""))
    return found


def address_of(pod: Object) -> str:
    """Where a pod's loader answers."""
    return f"{host(pod['status']['podIP'])}:{names.LOADER}"


def arms(base: ArmSeen, wanted: Sequence[str], ready: Pods, inside: Sequence[InPod]) -> dict[str, ArmSeen]:
    """What is seen of each version in a deployment's servers.

    Args:
        base: what is seen of the servers themselves.
        wanted: versions that should be in them.
        ready: names of the ready pods by endpoint.
        inside: every pod that is not on its way out.
    """
    by_name = {pod.name: pod for pod in inside}
    found = {}
    for version in {*wanted, *(version for pod in inside for version in pod.held)}:
        here = [pod.held[version] for pod in inside if version in pod.held]
        holding = [
            endpoint
            for endpoint, name in ready.items()
            if name in by_name and (one := by_name[name].held.get(version)) is not None and one.ready
        ]
        refusal = _worst([one.refusal for one in here if one.refusal is not None])
        servers = sum(one.loaded for one in here)
        if version in wanted:
            servers, refusal = base.servers, refusal or base.refusal or _unheard(inside)
        found[version] = ArmSeen(tuple(sorted(holding)), servers, refusal, base.service)
    return found


def _worst(refusals: list[Refusal]) -> Refusal | None:
    return next((one for one in refusals if one.permanent), refusals[0] if refusals else None)


def _unheard(inside: Sequence[InPod]) -> Refusal | None:
    pod = next((pod for pod in inside if pod.trouble), None)
    return Refusal("LoaderUnreachable", f"loader of pod {pod.name}: {pod.trouble}", permanent=False) if pod else None
