"""Kubernetes Events of ModelDeployments: what `kubectl describe` shows. They are written beside the work and may be lost; the status has them too."""

import asyncio
import contextlib
import hashlib
import logging
from datetime import UTC, datetime

from millrace_rollout_controller.kubernetes import names
from millrace_rollout_controller.kubernetes.api import MANAGER, ApiError, Cluster, NotLeaderError, Object
from millrace_rollout_controller.state import Status

log = logging.getLogger(__name__)
MAX_WAITING = 1000
"""Events not written yet; more are dropped."""


class Events:
    """Writes Events one after the other.

    Args:
        cluster: the API server.
        reporter: name of this pod.
    """

    def __init__(self, cluster: Cluster, reporter: str) -> None:
        self._cluster = cluster
        self._reporter = reporter
        self._queue: asyncio.Queue[Object] = asyncio.Queue(MAX_WAITING)
        self._loop = asyncio.get_running_loop()
        self._path = f"/api/v1/namespaces/{cluster.namespace}/events"

    def news(self, item: Object, before: Status, after: Status) -> None:
        """Events of `after` that `before` did not have."""
        for event in after.events:
            if event not in before.events:
                self.add(item, event.type, event.reason, event.message, event.at)

    def add(self, item: Object, kind: str, reason: str, message: str, at: datetime | None = None) -> None:
        """One event about `item`; from any thread."""
        at = at or datetime.now(UTC)
        metadata = item["metadata"]
        stamp = at.isoformat(timespec="seconds").replace("+00:00", "Z")
        # The same event of the same moment has the same name: writing it again after a restart changes nothing.
        text = f"{metadata['uid']} {at.isoformat()} {reason} {message}"
        name = f"{metadata['name']}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        body: Object = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": names.API_VERSION,
                "kind": "ModelDeployment",
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
            },
            "reason": reason[:128],
            "message": message[:1024],
            "type": kind,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
            "source": {"component": MANAGER},
            "reportingComponent": f"{names.GROUP}/rollout-controller",
            "reportingInstance": self._reporter[:128],
        }
        self._loop.call_soon_threadsafe(self._put, body)

    def _put(self, body: Object) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(body)

    async def run(self, stop: asyncio.Event) -> None:
        """Write until `stop`."""
        ended = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                following = asyncio.create_task(self._queue.get())
                await asyncio.wait({ended, following}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    return
                await self._write(following.result())
        finally:
            ended.cancel()

    async def _write(self, body: Object) -> None:
        try:
            await self._cluster.create(self._path, body)
        except ApiError as error:
            if error.status != 409:
                log.warning("event %s is lost: %s", body["reason"], error)
        except NotLeaderError:
            log.debug("event %s is the next leader's", body["reason"])
