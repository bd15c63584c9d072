"""Objects this controller owns, kept as they should be: applied when they differ, put back when somebody changed them.

What the API server made of an apply (it fills in defaults and writes quantities its own way) is remembered at the very paths that were
applied; a watched object that differs there has drifted.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from millrace_rollout_controller.kubernetes import names
from millrace_rollout_controller.kubernetes.api import MANAGER, ApiError, Cluster, NotLeaderError, Object
from millrace_rollout_controller.kubernetes.mirror import Mirror

log = logging.getLogger(__name__)
STARTER = f"{MANAGER}-start"
"""Field manager of a Deployment's first number of replicas, where an autoscaler decides afterwards."""
RETRY_S = 2.0
"""Wait before an object that was refused is applied again."""
PATHS = {
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "Service": "/api/v1/namespaces/{}/services",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "HorizontalPodAutoscaler": "/apis/autoscaling/v2/namespaces/{}/horizontalpodautoscalers",
}
Key = tuple[str, str]
"""Kind and name."""


@dataclass(slots=True)
class _Applied:
    """The last apply of one object."""

    asked: str
    """Digest of what was asked for."""
    made: Any
    """What the API server made of it, at the same paths."""


class Owned:
    """Applies and deletes; `converge` says what should be, `run` does it.

    Args:
        cluster: the API server.
        watched: mirrors of every kind in `PATHS`.
        parallel: writes under way at once.
        going: called when the deletion of an object begins.
    """

    def __init__(
        self, cluster: Cluster, watched: Mapping[str, Mirror], *, parallel: int, going: Callable[[], None]
    ) -> None:
        self._cluster = cluster
        self._watched = watched
        self._wanted: dict[Key, tuple[Object, int | None]] = {}
        self._unwanted: Callable[[Object], bool] = lambda _item: False
        self._applied: dict[Key, _Applied] = {}
        self._busy: dict[Key, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(parallel)
        self._begins = going
        self.going: set[Key] = set()
        """Objects whose deletion is under way: what still stands of them is of no use to anybody."""
        self.problems: dict[Key, str] = {}
        """Objects the API server refuses, and why."""

    def converge(self, wanted: Mapping[Key, tuple[Object, int | None]], unwanted: Callable[[Object], bool]) -> None:
        """Begin to make it so; returns at once.

        Args:
            wanted: by kind and name, with the number of replicas to begin with where an autoscaler decides afterwards.
            unwanted: whether an object that is there and not wanted may go now.
        """
        self._wanted = dict(wanted)
        self._unwanted = unwanted
        for key in self.problems.keys() - self._wanted.keys():
            del self.problems[key]
        for key in self._applied.keys() - self._wanted.keys():
            del self._applied[key]
        for key in self._wanted:
            self.look(key)
        for kind, mirror in self._watched.items():
            for name, item in mirror.objects.items():
                going = item["metadata"].get("deletionTimestamp")
                if (kind, name) not in self._wanted and not going and self._unwanted(item):
                    self._begin((kind, name))

    def look(self, key: Key) -> None:
        """Begin to correct one object, if it is wanted and not as it should be."""
        if key in self._wanted and self.differs(key):
            self._begin(key)

    def differs(self, key: Key) -> bool:
        """Whether an object is not as it should be."""
        body, _replicas = self._wanted[key]
        live = self._watched[key[0]].objects.get(key[1])
        applied = self._applied.get(key)
        if live is None or applied is None or applied.asked != _digest(body):
            return True
        return bool(at_paths(body, live) != applied.made)

    def _begin(self, key: Key) -> None:
        if key not in self._busy:
            task = asyncio.create_task(self._correct(key), name=f"{key[0]} {key[1]}")
            self._busy[key] = task
            task.add_done_callback(lambda _task: self._busy.pop(key, None))

    async def _correct(self, key: Key) -> None:
        try:
            async with self._slots:
                if key in self._wanted:
                    await self._apply(key)
                else:
                    await self._delete(key)
            self.problems.pop(key, None)
        except NotLeaderError:
            return
        except ApiError as error:
            if self.problems.get(key) != error.message:
                log.warning("%s %s: %s", *key, error)
            self.problems[key] = error.message
            await asyncio.sleep(RETRY_S)

    async def _apply(self, key: Key) -> None:
        kind, name = key
        body, replicas = self._wanted[key]
        mirror = self._watched[kind]
        live = mirror.objects.get(name)
        self._check_owner(live, body)
        path = f"{mirror.path}/{name}"
        start: Object = {
            "apiVersion": body["apiVersion"],
            "kind": kind,
            "metadata": {"name": name},
            "spec": {"replicas": replicas},
        }
        if live is not None and replicas is not None and live["spec"].get("replicas") == 0:
            # It wakes: the number has to be somebody else's before it stops being ours, else the API server makes it 1.
            await self._cluster.apply(path, start, manager=STARTER)
        made = await self._cluster.apply(path, body)
        if live is None and replicas is not None:
            made = await self._cluster.apply(path, start, manager=STARTER)
        applied = self._applied.get(key)
        if live is not None and applied is not None and applied.asked == _digest(body):
            log.warning("%s %s was changed by somebody; it is as it should be again", kind, name)
        else:
            log.info("%s %s is applied", kind, name)
        self._applied[key] = _Applied(_digest(body), at_paths(body, made))
        mirror.put(made)

    def _check_owner(self, live: Object | None, body: Object) -> None:
        """Never take what somebody else made under the same name."""
        if live is None:
            return
        mine = body["metadata"]["labels"][names.DEPLOYMENT_LABEL]
        if live["metadata"].get("labels", {}).get(names.DEPLOYMENT_LABEL, mine) != mine:
            message = f"{body['kind']} {body['metadata']['name']} belongs to another ModelDeployment"
            raise ApiError(409, "NameTaken", message)

    async def _delete(self, key: Key) -> None:
        kind, name = key
        mirror = self._watched[kind]
        item = mirror.objects.get(name)
        if item is None:
            return
        self.going.add(key)
        self._begins()
        try:
            await self._cluster.delete(f"{mirror.path}/{name}", uid=item["metadata"]["uid"])
            mirror.drop(item)
            log.info("%s %s is deleted", kind, name)
        finally:
            self.going.discard(key)
            self._begins()

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._busy.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def at_paths(asked: Any, live: Any) -> Any:
    """The part of `live` that `asked` names. Lists of named things are compared by name, so that additions of others do not count."""
    if isinstance(asked, dict) and isinstance(live, dict):
        return {key: at_paths(value, live.get(key)) for key, value in asked.items()}
    if _named(asked) and _named(live):
        there = {one["name"]: one for one in live}
        return {one["name"]: at_paths(one, there.get(one["name"])) for one in asked}
    return live


def _named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "name" in one for one in value)


def _digest(body: Object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
