"""Follows one ModelDeployment and its pods, and says when a rollout is over."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import grpc
from millrace_api.rollout.v1.rollout_pb2 import Deployment
from millrace_kit.errors import MillraceError

from millrace.kubectl import objects
from millrace.kubectl.cluster import Cluster, ClusterError, Object
from millrace.tree import Pod

REFRESH_S = 1.0
"""Pods are asked for this often, and ages move on."""
RETRY_S = 1.0
MAX_EVENTS = 100
"""Changes not shown yet; a watch that is further ahead waits."""
RETRYABLE = {0, 410, 429, 500, 503, 504}
MOVING = {"Preparing", "Progressing", "Promoting", "RollingBack", "Paused", ""}


class GoneError(MillraceError):
    """The ModelDeployment was deleted while it was watched."""

    def __init__(self, name: str) -> None:
        super().__init__(grpc.StatusCode.NOT_FOUND, "DELETED", f"{name} was deleted", {"name": name})


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a rollout stands."""

    state: Literal["done", "failed", "moving"]
    text: str
    """For people."""


def outcome(deployment: Deployment) -> Outcome:
    """Whether the wanted version serves, was given up, or is still on its way. Pure."""
    conditions = {one.type: one for one in deployment.conditions}
    degraded = conditions.get("Degraded")
    if deployment.observed_generation < deployment.generation:
        return Outcome("moving", "the controller has not looked at the newest spec yet")
    if degraded is not None and degraded.status == "True" and deployment.phase not in MOVING:
        return Outcome("failed", f"{deployment.phase or 'Degraded'}: {degraded.reason}: {degraded.message}")
    if deployment.phase in {"RolledBack", "Degraded"}:
        return Outcome("failed", f"{deployment.phase}: {deployment.waiting or 'see the events'}")
    if deployment.phase in MOVING or deployment.candidate_version:
        where = (
            f"{deployment.candidate_version} at {deployment.candidate_weight:g}%"
            if deployment.candidate_version
            else ""
        )
        return Outcome(
            "moving", ": ".join(part for part in (deployment.phase or "New", where, deployment.waiting) if part)
        )
    ready = conditions.get("Ready")
    if ready is None or ready.status != "True":
        return Outcome("moving", f"{deployment.phase}: {ready.message if ready is not None else 'not ready yet'}")
    return Outcome("done", f"{deployment.phase}: {ready.message}")


def states(cluster: Cluster, name: str, deadline: float | None = None) -> Iterator[tuple[Deployment, list[Pod]] | None]:
    """The deployment and its pods: now, and after every change; None once `deadline` (monotonic) is over.

    Raises:
        GoneError: it was deleted.
        ClusterError: the API server refuses; outages are waited for.
    """
    item = cluster.deployment(name)
    changes: queue.Queue[Object | MillraceError] = queue.Queue(MAX_EVENTS)
    stop = threading.Event()
    watcher = threading.Thread(target=_follow, args=(cluster, name, item, changes, stop), daemon=True)
    watcher.start()
    servers: list[Pod] = []
    try:
        while True:
            with contextlib.suppress(ClusterError):
                servers = objects.pods(cluster.pods(name))
            yield objects.deployment(item), servers
            if deadline is not None and time.monotonic() > deadline:
                yield None
                return
            with contextlib.suppress(queue.Empty):
                found = changes.get(timeout=REFRESH_S)
                if isinstance(found, MillraceError):
                    raise found
                item = found
    finally:
        stop.set()


def _follow(
    cluster: Cluster, name: str, item: Object, changes: "queue.Queue[Object | MillraceError]", stop: threading.Event
) -> None:
    """Put every newer object into `changes`, over outages and ends of watches; an error ends it."""
    version: Any = item["metadata"]["resourceVersion"]
    while not stop.is_set():
        try:
            for event in cluster.watch(name, version):
                if stop.is_set():
                    return
                if event["type"] == "DELETED":
                    changes.put(GoneError(name))
                    return
                version = event["object"]["metadata"]["resourceVersion"]
                changes.put(event["object"])
        except ClusterError as error:
            if error.status not in RETRYABLE:
                changes.put(error)
                return
            stop.wait(RETRY_S)
            with contextlib.suppress(ClusterError):
                item = cluster.deployment(name)
                version = item["metadata"]["resourceVersion"]
                changes.put(item)
