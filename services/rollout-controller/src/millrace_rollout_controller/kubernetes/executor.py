"""The executor of a cluster: each version is a Deployment with its Service, budget and autoscaler; pods come and go by Kubernetes' own rules."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from millrace_kit.errors import InvalidArgumentError

from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.kubernetes import names, objects, observing
from millrace_rollout_controller.kubernetes.api import Cluster, Object
from millrace_rollout_controller.kubernetes.mirror import Mirror
from millrace_rollout_controller.kubernetes.owned import PATHS, Key, Owned
from millrace_rollout_controller.kubernetes.settings import KubernetesSettings
from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.plans import ArmSeen, Refusal

log = logging.getLogger(__name__)
SYNC_TIMEOUT_S = 60.0
"""Longest wait for the first list of a kind; nothing is decided before."""


class KubernetesExecutor:
    """Applies what is wanted, deletes what is not, reports what pods say.

    Args:
        cluster: the API server.
        settings: defaults of the pods.
        owners: ModelDeployments by name, for owner references.
        changed: called when something of a version changed.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: KubernetesSettings,
        owners: Callable[[str], Object | None],
        changed: Callable[[], None],
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._owners = owners
        self._changed = changed
        own = {kind: path.format(cluster.namespace) for kind, path in PATHS.items()}
        self._watched = {
            kind: Mirror(cluster, path, selector=names.SELECTOR, changed=self._drift(kind))
            for kind, path in own.items()
        }
        core = f"/api/v1/namespaces/{cluster.namespace}"
        discovery = f"/apis/discovery.k8s.io/v1/namespaces/{cluster.namespace}"
        note = self._note
        self._pods = Mirror(cluster, f"{core}/pods", selector=names.SELECTOR, keep=_pod, changed=note)
        # The endpoint controller copies a Service's labels to its slices.
        self._slices = Mirror(cluster, f"{discovery}/endpointslices", selector=names.SELECTOR, changed=note)
        self._owned = Owned(cluster, self._watched, parallel=settings.parallel_writes, going=self._forget_seen)
        self._tasks: list[asyncio.Task[None]] = []
        self._wanted: Mapping[Key, tuple[Object, int | None]] = {}
        self._seen: Mapping[tuple[str, str], ArmSeen] | None = None

    def check(self, spec: Spec) -> None:
        """Refuse servers of several versions; what no node can give stays Pending, with the scheduler's own words in the conditions."""
        if spec.server.placement == "Shared":
            raise InvalidArgumentError("spec.server.placement", "Shared is available on one machine only")

    async def start(self) -> None:
        """List and watch everything that belongs to model versions."""
        mirrors = [*self._watched.values(), self._pods, self._slices]
        await asyncio.gather(*(mirror.start(self._tasks, SYNC_TIMEOUT_S) for mirror in mirrors))
        behind = [mirror.path for mirror in mirrors if not mirror.synced.is_set()]
        if behind:
            raise TimeoutError(f"the API server did not list {', '.join(behind)} in {SYNC_TIMEOUT_S:g} s")

    async def converge(self, wanted: Sequence[Wanted], in_use: frozenset[str] | None) -> None:
        """See `Executor.converge`. A version goes when nobody wants it and no gateway may still send to its pods."""
        asked: dict[Key, tuple[Object, int | None]] = {}
        for want in wanted:
            owner = self._owners(want.deployment)
            if owner is None:
                continue
            start = objects.starting_replicas(want)
            for item in objects.build(want, owner, self._settings):
                key = item["kind"], item["metadata"]["name"]
                asked[key] = (item, start if item["kind"] == "Deployment" else None)
        ready = {names.object_name(*name): arm.ready for name, arm in self.seen().items()}

        def unwanted(item: Object) -> bool:
            return in_use is not None and not in_use.intersection(ready.get(item["metadata"]["name"], ()))

        self._wanted = asked
        self._owned.converge(asked, unwanted)

    def seen(self) -> Mapping[tuple[str, str], ArmSeen]:
        """See `Executor.seen`."""
        if self._seen is None:
            going = self._owned.going
            objects_ = self._watched["Deployment"].objects
            workloads = {name: item for name, item in objects_.items() if ("Deployment", name) not in going}
            self._seen = observing.arms(self._cluster.namespace, workloads, self._pods.objects, self._slices.objects)
        return self._with_problems(dict(self._seen)) if self._owned.problems else self._seen

    def _with_problems(self, found: dict[tuple[str, str], ArmSeen]) -> dict[tuple[str, str], ArmSeen]:
        for key, problem in self._owned.problems.items():
            wanted = self._wanted.get(key)
            if wanted is None:
                continue
            metadata = wanted[0]["metadata"]
            name = metadata["labels"][names.DEPLOYMENT_LABEL], metadata["annotations"][names.VERSION_ANNOTATION]
            arm = found.get(name, ArmSeen())
            refusal = arm.refusal or Refusal("ObjectRefused", f"{key[0]} {key[1]}: {problem}", permanent=False)
            found[name] = ArmSeen(arm.ready, arm.servers, refusal, arm.service)
        return found

    def _forget_seen(self) -> None:
        self._seen = None

    def _note(self, _name: str) -> None:
        self._seen = None
        self._changed()

    def _drift(self, kind: str) -> Callable[[str], None]:
        def changed(name: str) -> None:
            self._owned.look((kind, name))
            self._note(name)

        return changed

    async def close(self) -> None:
        """Stop watching; the servers go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._owned.close()


def _pod(item: Object) -> Object:
    """Only what `observing` reads: pods are the many."""
    metadata, status = item["metadata"], item.get("status", {})
    kept = ("name", "labels", "annotations", "uid", "resourceVersion", "creationTimestamp", "deletionTimestamp")
    parts = ("phase", "conditions", "initContainerStatuses", "containerStatuses")
    return {
        "metadata": {key: metadata[key] for key in kept if key in metadata},
        "status": {key: status[key] for key in parts if key in status},
    }
