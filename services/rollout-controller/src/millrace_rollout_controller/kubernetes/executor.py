"""The executor of a cluster: each version, or all that share their servers, is a Deployment with its Service, budget and autoscaler; pods
come and go by Kubernetes' own rules.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

import grpc.aio
from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError

from millrace_rollout_controller.executor import PoolSeen, Wanted
from millrace_rollout_controller.kubernetes import names, objects, observing, sharing
from millrace_rollout_controller.kubernetes.api import Cluster, Object
from millrace_rollout_controller.kubernetes.loaders import Loaders
from millrace_rollout_controller.kubernetes.mirror import Mirror
from millrace_rollout_controller.kubernetes.order import Orders
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
        open_loader: makes a channel to the loader in a pod that holds several versions.
        clock: for the revisions of what such pods should hold.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: KubernetesSettings,
        owners: Callable[[str], Object | None],
        changed: Callable[[], None],
        *,
        open_loader: Callable[[str], grpc.aio.Channel],
        clock: Clock,
    ) -> None:
        self._clock = clock
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
        self._loaders = Loaders(
            open_loader,
            poll_s=settings.fetch.loader_poll_s,
            timeout_s=settings.fetch.loader_timeout_s,
            changed=lambda: note(""),
        )
        self._orders: dict[str, Orders] = {}
        """Of deployments whose versions share servers: what these should hold."""
        self._groups: Mapping[str, sharing.Group] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._wanted: Mapping[Key, tuple[Object, int | None]] = {}
        self._seen: tuple[dict[observing.Name, ArmSeen], dict[str, dict[str, str]]] | None = None
        """Of the servers, and their ready pods by Service."""

    def check(self, spec: Spec) -> None:
        """Refuse servers of several models; what no node can give stays Pending, with the scheduler's own words in the conditions."""
        if spec.server.pool is not None:
            raise InvalidArgumentError("spec.server.pool", "is available on one machine only")

    async def start(self) -> None:
        """List and watch everything that belongs to model versions."""
        mirrors = [*self._watched.values(), self._pods, self._slices]
        await asyncio.gather(*(mirror.start(self._tasks, SYNC_TIMEOUT_S) for mirror in mirrors))
        behind = [mirror.path for mirror in mirrors if not mirror.synced.is_set()]
        if behind:
            raise TimeoutError(f"the API server did not list {', '.join(behind)} in {SYNC_TIMEOUT_S:g} s")
        self._tell()
        await self._loaders.first()

    async def converge(self, wanted: Sequence[Wanted], in_use: frozenset[str] | None) -> None:
        """See `Executor.converge`. A version goes when nobody wants it and no gateway may still send to its pods."""
        own, groups = sharing.apart(wanted)
        asked = self._asked([(want, None) for want in own])
        self._groups = {group.want.deployment: group for group in groups}
        self._orders = {name: self._orders_of(group, in_use) for name, group in self._groups.items()}
        asked |= self._asked([(group.want, self._orders[name]) for name, group in self._groups.items()])
        ready: dict[str, set[str]] = {}
        for (deployment, version), arm in self.seen().items():
            for name in {names.object_name(deployment, version), names.object_name(deployment, names.SHARED)}:
                ready.setdefault(name, set()).update(arm.ready)

        def unwanted(item: Object) -> bool:
            return in_use is not None and not in_use.intersection(ready.get(item["metadata"]["name"], ()))

        self._wanted = asked
        self._owned.converge(asked, unwanted)
        self._tell()

    def _asked(self, wanted: Sequence[tuple[Wanted, Orders | None]]) -> dict[Key, tuple[Object, int | None]]:
        asked: dict[Key, tuple[Object, int | None]] = {}
        for want, orders in wanted:
            owner = self._owners(want.deployment)
            if owner is None:
                continue
            start = objects.starting_replicas(want)
            for item in objects.build(want, owner, self._settings, orders):
                key = item["kind"], item["metadata"]["name"]
                asked[key] = (item, start if item["kind"] == "Deployment" else None)
        return asked

    def _orders_of(self, group: sharing.Group, in_use: frozenset[str] | None) -> Orders:
        name = group.want.deployment
        live = sharing.stored(self._watched["ConfigMap"].objects.get(names.object_name(name, names.SHARED)))
        before = self._orders.get(name) or live
        now_ms = round(self._clock.now().timestamp() * 1000)
        used = sharing.in_use_inside(self._shared_pods(name), in_use)
        return sharing.orders(group, before, used, self._settings.servers, now_ms)

    def _shared_pods(self, deployment: str) -> list[Object]:
        name = deployment, names.SHARED
        return [pod for pod in self._pods.objects.values() if observing.name_of(pod) == name]

    def _tell(self) -> None:
        self._loaders.converge(sharing.told(self._pods.objects, self._watched["ConfigMap"].objects))

    def seen(self) -> Mapping[tuple[str, str], ArmSeen]:
        """See `Executor.seen`."""
        if self._seen is None:
            going = self._owned.going
            objects_ = self._watched["Deployment"].objects
            workloads = {name: item for name, item in objects_.items() if ("Deployment", name) not in going}
            found = observing.arms(self._cluster.namespace, workloads, self._pods.objects, self._slices.objects)
            self._seen = found, observing.ready_pods(workloads, self._pods.objects, self._slices.objects)
        found, ready = self._seen
        if self._owned.problems:
            found = self._with_problems(dict(found))
        shared = any(version == names.SHARED for _, version in found)
        return self._versions(found, ready) if shared else found

    def pools(self) -> Mapping[str, PoolSeen]:
        """See `Executor.pools`; there are none in a cluster."""
        return {}

    def _versions(
        self, found: Mapping[observing.Name, ArmSeen], ready: Mapping[str, observing.Pods]
    ) -> dict[observing.Name, ArmSeen]:
        """Servers of several versions as what they are to each of them."""
        result = {}
        for (deployment, version), arm in found.items():
            if version != names.SHARED:
                result[deployment, version] = arm
                continue
            group = self._groups.get(deployment)
            wanted = [want.ref.version for want in group.versions] if group else []
            pods = ready.get(names.object_name(deployment, version), {})
            inside = sharing.inside(self._shared_pods(deployment), self._loaders)
            arms = sharing.arms(arm, wanted, pods, inside)
            result |= {(deployment, one): seen for one, seen in arms.items()}
        return result

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
        await self._loaders.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._owned.close()


def _pod(item: Object) -> Object:
    """Only what `observing` reads: pods are the many."""
    metadata, status = item["metadata"], item.get("status", {})
    kept = ("name", "labels", "annotations", "uid", "resourceVersion", "creationTimestamp", "deletionTimestamp")
    parts = ("phase", "podIP", "conditions", "initContainerStatuses", "containerStatuses")
    return {
        "metadata": {key: metadata[key] for key in kept if key in metadata},
        "status": {key: status[key] for key in parts if key in status},
    }
