"""Which replica works: a coordination.k8s.io Lease by client-go's rule, and a label on the leader's pod that its Service selects.

A leader that cannot renew stops writing before anybody else may begin, and ends its process: what comes up again knows nothing stale.
"""

import asyncio
import contextlib
import logging
import time
from datetime import UTC, datetime
from typing import Any

from millrace_rollout_controller.kubernetes import names
from millrace_rollout_controller.kubernetes.api import ApiError, Cluster, Object
from millrace_rollout_controller.kubernetes.settings import LeaseSettings

log = logging.getLogger(__name__)


class LeadershipLostError(Exception):
    """The lease could not be renewed in time, or another replica has it."""


class Leader:
    """Takes, renews and gives back one Lease.

    Args:
        cluster: the API server.
        settings: names and times.
        identity: this replica; the name of its pod.
        pod: pod that is labelled while this replica leads; empty labels none.
    """

    def __init__(self, cluster: Cluster, settings: LeaseSettings, identity: str, pod: str) -> None:
        self._cluster = cluster
        self._settings = settings
        self._identity = identity
        self._pod = pod
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{cluster.namespace}/leases"
        self._pods = f"/api/v1/namespaces/{cluster.namespace}/pods"
        self._seen: tuple[object, float] = (None, 0.0)
        self._renewed = float("-inf")
        self._leads = False
        self.acquired = asyncio.Event()
        """Set once this replica leads; it never leads twice."""

    def holds(self) -> bool:
        """Whether this replica may write: its lease is renewed, and nobody else may have it yet."""
        return self._leads and time.monotonic() - self._renewed < self._settings.renew_deadline_s

    async def run(self, stop: asyncio.Event) -> None:
        """Stand by, then lead, until `stop`.

        Raises:
            LeadershipLostError: leadership ended; the process must end as well.
        """
        if self._pod:
            await self._label(self._pod, None)
        while not stop.is_set():
            try:
                mine = await asyncio.wait_for(self._try(), self._settings.renew_deadline_s)
            except (ApiError, TimeoutError) as error:
                log.warning("lease %s: %s", self._settings.name, error or type(error).__name__)
                mine = self._leads
            if mine and not self._leads and self._renewed > 0:
                self._leads = True
                log.info("%s leads", self._identity)
                await self._mark()
                self.acquired.set()
            if self._leads and not (mine and self.holds()):
                self._leads = False
                raise LeadershipLostError(f"{self._identity} leads no more")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self._settings.renew_s)

    async def release(self) -> None:
        """Give the lease back, so that another replica takes over at once."""
        if not self._leads:
            return
        self._leads = False
        with contextlib.suppress(ApiError):
            if self._pod:
                await self._label(self._pod, None)
            lease = await self._cluster.get(f"{self._path}/{self._settings.name}")
            if lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
                await self._cluster.replace(f"{self._path}/{self._settings.name}", lease, fenced=False)
                log.info("%s gave the lease back", self._identity)

    async def _try(self) -> bool:
        """Take or renew; whether this replica has it now. The clocks of others do not matter: only when their lease last changed here."""
        began = time.monotonic()
        try:
            lease = await self._cluster.get(f"{self._path}/{self._settings.name}")
        except ApiError as error:
            if error.status != 404:
                raise
            return await self._create(began)
        spec: dict[str, Any] = lease.get("spec") or {}
        held = spec.get("holderIdentity") or ""
        mark = (held, spec.get("renewTime"), spec.get("leaseTransitions"))
        if mark != self._seen[0]:
            self._seen = mark, began
        if held not in {"", self._identity}:
            wait = spec.get("leaseDurationSeconds") or self._settings.duration_s
            if self._leads or began - self._seen[1] < wait:
                return False
        # A restarted container has its pod's identity, and may go on where the one before ended.
        changed = held != self._identity
        lease["spec"] = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._settings.duration_s,
            "acquireTime": _now() if changed else spec.get("acquireTime") or _now(),
            "renewTime": _now(),
            "leaseTransitions": int(spec.get("leaseTransitions") or 0) + changed,
        }
        try:
            await self._cluster.replace(f"{self._path}/{self._settings.name}", lease, fenced=False)
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        self._renewed = began
        return True

    async def _create(self, began: float) -> bool:
        lease: Object = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._settings.name},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": self._settings.duration_s,
                "acquireTime": _now(),
                "renewTime": _now(),
                "leaseTransitions": 0,
            },
        }
        try:
            await self._cluster.create(self._path, lease, fenced=False)
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        self._renewed = began
        return True

    async def _mark(self) -> None:
        """Label this pod, and no other: a leader that was killed left its label behind."""
        if not self._pod:
            return
        selector = {"labelSelector": f"{names.LEADER_LABEL}=true"}
        try:
            for pod in (await self._cluster.get(self._pods, selector))["items"]:
                if pod["metadata"]["name"] != self._pod:
                    await self._label(pod["metadata"]["name"], None)
        except ApiError as error:
            log.warning("labels of the other pods: %s", error)
        await self._label(self._pod, "true")

    async def _label(self, pod: str, value: str | None) -> None:
        try:
            body = {"metadata": {"labels": {names.LEADER_LABEL: value}}}
            await self._cluster.merge(f"{self._pods}/{pod}", body, fenced=False)
        except ApiError as error:
            log.log(logging.INFO if error.status == 404 else logging.WARNING, "label of pod %s: %s", pod, error.message)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
