"""Objects of one kind in memory, as the API server has them: list, then watch, for ever.

A deletion that happened while the watch was down is seen, because a new list replaces what was known. (kopf's handlers see events only: an
object that went while the connection was down stays in what they remember, see docs/decisions/0016.)
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from millrace_rollout_controller.kubernetes.api import ApiError, Cluster, Object

log = logging.getLogger(__name__)
PAGE = "500"
"""Objects of one page of a list."""
BACKOFF_S = 0.25
BACKOFF_MAX_S = 5.0


class Mirror:
    """One kind in one namespace.

    Args:
        cluster: the API server.
        path: collection, for example `/api/v1/namespaces/x/pods`.
        selector: label selector; empty is everything.
        keep: what to remember of an object.
        changed: called with the name after each change.
    """

    def __init__(
        self,
        cluster: Cluster,
        path: str,
        *,
        selector: str = "",
        keep: Callable[[Object], Object] | None = None,
        changed: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self.path = path
        self._query = {"labelSelector": selector} if selector else {}
        self._keep = keep or _plain
        self._changed = changed
        self._version = ""
        self._seen = 0
        self.objects: dict[str, Object] = {}
        """By name. Values are replaced, never changed."""
        self.synced = asyncio.Event()
        """Set after the first list."""

    async def run(self) -> None:
        """Follow until cancelled."""
        wait = BACKOFF_S
        while True:
            try:
                if not self._version:
                    await self._list()
                wait = BACKOFF_S
                async for event in self._cluster.watch(self.path, self._query, self._version):
                    self._take(event)
            except ApiError as error:
                if error.status in {404, 410} or error.reason == "Expired":
                    self._version = ""
                if error.status != 410:
                    log.warning("%s: %s", self.path, error)
                    await asyncio.sleep(wait)
                    wait = min(wait * 2, BACKOFF_MAX_S)

    async def _list(self) -> None:
        found: dict[str, Object] = {}
        query = {**self._query, "limit": PAGE}
        while True:
            page = await self._cluster.get(self.path, query)
            kind = page["kind"].removesuffix("List")
            for item in page["items"]:
                item.setdefault("kind", kind)
                item.setdefault("apiVersion", page["apiVersion"])
                found[item["metadata"]["name"]] = self._keep(item)
            token = page["metadata"].get("continue", "")
            if not token:
                break
            query["continue"] = token
        before = self.objects
        self._version = page["metadata"]["resourceVersion"]
        self._seen = max(self._seen, int(self._version))
        self.objects = found
        self.synced.set()
        for name in before.keys() | found.keys():
            if version_of(before.get(name)) != version_of(found.get(name)):
                self._changed(name)

    def _take(self, event: Object) -> None:
        item = event["object"]
        self._version = item["metadata"]["resourceVersion"]
        self._seen = max(self._seen, int(self._version))
        if event["type"] == "BOOKMARK":
            return
        name = item["metadata"]["name"]
        if event["type"] == "DELETED":
            # One of the same name may have been made since.
            if version_of(item) >= version_of(self.objects.get(name)):
                self.objects.pop(name, None)
        elif version_of(item) >= version_of(self.objects.get(name)):
            self.objects[name] = self._keep(item)
        self._changed(name)

    def get(self, name: str) -> Object | None:
        """One object as last heard of."""
        return self.objects.get(name)

    def put(self, item: Object) -> None:
        """Remember the answer of a write before the watch brings it; older news are ignored.

        Resource versions of one kind rise, which Kubernetes 1.35 promises and etcd always did.
        """
        name = item["metadata"]["name"]
        if version_of(item) > max(self._seen, version_of(self.objects.get(name))):
            self.objects[name] = self._keep(item)

    def drop(self, item: Object) -> None:
        """Forget an object that was deleted before the watch says so."""
        name = item["metadata"]["name"]
        known = self.objects.get(name)
        if known is not None and known["metadata"]["uid"] == item["metadata"]["uid"]:
            del self.objects[name]

    async def start(self, tasks: list[asyncio.Task[None]], timeout_s: float) -> None:
        """Begin to follow; returns when the first list is here, or after `timeout_s`."""
        tasks.append(asyncio.create_task(self.run(), name=f"mirror {self.path}"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.synced.wait(), timeout_s)


def version_of(item: Object | None) -> int:
    """Resource version; 0 of nothing."""
    return int(item["metadata"]["resourceVersion"]) if item else 0


def _plain(item: Object) -> Object:
    """All but what only the API server needs, which is the larger half of many objects."""
    item["metadata"].pop("managedFields", None)
    return item
