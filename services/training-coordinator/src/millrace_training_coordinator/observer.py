"""Jobs and pods of all attempts as the API server has them, listed at most once every `poll_s` for everybody who asks."""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from millrace_training_coordinator.jobs import SELECTOR
from millrace_training_coordinator.kubeapi import KubeApi, KubernetesError, KubernetesUnavailableError

log = logging.getLogger(__name__)

PAGE = 500
COMPLAIN_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class View:
    """One attempt's Job and pods at one moment."""

    job: Mapping[str, Any] | None
    pods: tuple[Mapping[str, Any], ...]


class Observer:
    """Lists Jobs and pods.

    Args:
        api: the API server.
        namespace: of the Jobs.
        poll_s: how old a list may be.
    """

    def __init__(self, api: KubeApi, namespace: str, poll_s: float) -> None:
        self._api = api
        self._namespace = namespace
        self._poll_s = poll_s
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._jobs: dict[str, Mapping[str, Any]] = {}
        self._pods: dict[str, list[Mapping[str, Any]]] = {}
        self._complained_at = float("-inf")

    async def view(self, name: str, after: float) -> View:
        """The Job called `name` and its pods, as they were after the monotonic instant `after`; waits for the API server."""
        async with self._lock:
            while self._asked_at < after:
                asked_at = time.monotonic()
                try:
                    # Pods first: a Job that is over then has no pod that this list does not know.
                    pods = await self._list(f"/api/v1/namespaces/{self._namespace}/pods")
                    made = await self._list(f"/apis/batch/v1/namespaces/{self._namespace}/jobs")
                except (KubernetesUnavailableError, KubernetesError) as error:
                    self._complain(error)
                    await asyncio.sleep(self._poll_s)
                    continue
                self._jobs = {job["metadata"]["name"]: job for job in made}
                self._pods = {}
                for pod in pods:
                    owner = pod["metadata"].get("labels", {}).get("batch.kubernetes.io/job-name", "")
                    self._pods.setdefault(owner, []).append(pod)
                self._asked_at = asked_at
        return View(self._jobs.get(name), tuple(self._pods.get(name, ())))

    async def _list(self, path: str) -> list[Mapping[str, Any]]:
        items: list[Mapping[str, Any]] = []
        params = {"labelSelector": SELECTOR, "limit": str(PAGE)}
        while True:
            page = await self._api.call("GET", path, params=params)
            items.extend(page["items"])
            token = page["metadata"].get("continue", "")
            if not token:
                return items
            params["continue"] = token

    def _complain(self, error: Exception) -> None:
        if time.monotonic() - self._complained_at > COMPLAIN_EVERY_S:
            self._complained_at = time.monotonic()
            log.warning("Jobs cannot be listed, stages run on meanwhile: %s", error)
