"""The store of a cluster: ModelDeployment objects, and one ConfigMap for the route table and the gateways heard of.

Reads come from memory. Every write names the resource version it was made from, so whoever comes second gets `ConflictError` and reads
again. The methods block a worker thread while the event loop talks to the API server.
"""

import asyncio
import base64
import contextlib
import gzip
import logging
from collections.abc import Coroutine
from datetime import datetime
from typing import Any, TypeVar

from millrace_kit.clock import Clock
from millrace_kit.errors import ConflictError, InvalidArgumentError, UnavailableError
from pydantic import TypeAdapter

from millrace_rollout_controller.hub import GatewaySeen, Table
from millrace_rollout_controller.kubernetes import admission, annotations, names, public_status
from millrace_rollout_controller.kubernetes.admission import Admitted, Checker
from millrace_rollout_controller.kubernetes.api import ApiError, Cluster, NotLeaderError, Object
from millrace_rollout_controller.kubernetes.events import Events
from millrace_rollout_controller.kubernetes.mirror import Mirror, version_of
from millrace_rollout_controller.kubernetes.public_status import FORMAT, Internal, Problem
from millrace_rollout_controller.state import Route, Status
from millrace_rollout_controller.store import Row

log = logging.getLogger(__name__)
T = TypeVar("T")
PERSON = "millrace"
"""Field manager of manifests that came by gRPC."""
CALL_TIMEOUT_S = 60.0
"""Longest wait of a thread for the event loop; each request has its own, shorter deadline."""
GATEWAYS_SAVE_S = 2.0
"""Least time between two writes of the gateways heard of: they say it again when they come back."""
_ROUTES = TypeAdapter(tuple[Route, ...])
_GATEWAYS = TypeAdapter(dict[str, tuple[int, float]])


class KubernetesStore:
    """See the module.

    Args:
        cluster: the API server.
        mirror: ModelDeployments, watched.
        events: where status events go as Kubernetes Events.
        check: refuses specs the executor cannot give.
        clock: for times in the status.
        routes: name of the ConfigMap.
        limit: most deployments.
    """

    def __init__(
        self,
        cluster: Cluster,
        mirror: Mirror,
        events: Events,
        *,
        check: Checker,
        clock: Clock,
        routes: str,
        limit: int,
    ) -> None:
        self._cluster = cluster
        self._mirror = mirror
        self._events = events
        self._check = check
        self._clock = clock
        self._limit = limit
        self._maps = f"/api/v1/namespaces/{cluster.namespace}/configmaps"
        self._map = routes
        self._loop = asyncio.get_running_loop()
        self._read: dict[str, Admitted] = {}
        self._rows: dict[str, Row] = {}
        self._gateways: dict[str, GatewaySeen] = {}
        self._gateways_dirty = asyncio.Event()

    def get(self, name: str) -> Row | None:
        """See `Store.get`."""
        return next((row for row in self.rows() if row.name == name), None)

    def rows(self) -> list[Row]:
        """See `Store.rows`; what a person asked by annotation is done here, once and before anything else is decided."""
        if not self._mirror.synced.is_set():
            raise UnavailableError("NOT_READY", "the ModelDeployments are not read yet")
        found = self._admit()
        rows = []
        for name in sorted(found):
            one = found[name]
            if one.spec is None:
                self._complain(one)
                continue
            row = self._row(one)
            if one.problem is not None and not _said(one.item, one.problem):
                with contextlib.suppress(ConflictError, UnavailableError):
                    row = self._call(self._write_status(one, row, None))
                    self._events.add(one.item, "Warning", one.problem.reason, one.problem.text)
            if (asked := annotations.unanswered(one.item)) is not None and not row.deleting:
                row = self._answer(one, row, asked)
            self._rows[name] = row
            rows.append(row)
        self._rows = {row.name: row for row in rows}
        return rows

    def _admit(self) -> dict[str, Admitted]:
        """Every object, read once per resource version."""
        objects = dict(self._mirror.objects)
        for name in self._read.keys() - objects.keys():
            del self._read[name]
        for name, item in objects.items():
            known = self._read.get(name)
            if known is None or known.item is not item:
                self._read[name] = admission.read(item, self._check)
        return admission.together(self._read.values(), self._limit)

    def _row(self, one: Admitted) -> Row:
        metadata = one.item["metadata"]
        before = self._rows.get(metadata["name"])
        revision = version_of(one.item)
        if before is not None and before.revision == revision and before.manifest == one.manifest_text:
            return before
        internal = one.internal or Internal()
        assert one.spec is not None
        return Row(
            name=metadata["name"],
            model=one.spec.model,
            manifest=one.manifest_text,
            generation=one.generation,
            revision=revision,
            deleting="deletionTimestamp" in metadata,
            status=public_status.unpack_state(internal),
            evidence=public_status.unpack_evidence(internal),
            created_at=datetime.fromisoformat(metadata["creationTimestamp"]),
        )

    def _answer(self, one: Admitted, row: Row, asked: annotations.Asked) -> Row:
        """Do what the annotation asks and write down that it is done, in one write."""
        assert one.spec is not None
        status, result = annotations.perform(asked, one.spec, row.status, self._clock.now())
        log.info("%s: %s: %s %s", row.name, asked.text, result["result"], result["message"])
        try:
            return self._call(self._write_status(one, _with(row, status=status), result))
        except (ConflictError, UnavailableError):
            # Not done yet: go on with what was known, if it is from before the person asked.
            before = self._rows.get(row.name)
            if before is None:
                raise
            return before

    def _complain(self, one: Admitted) -> None:
        """Say in the status why a manifest is not in force; once per generation and message."""
        item, problem = one.item, one.problem
        assert problem is not None
        metadata, status = item["metadata"], item.get("status") or {}
        if metadata.get("deletionTimestamp"):
            if names.FINALIZER in metadata.get("finalizers", []):
                self.delete(metadata["name"])
            return
        now = public_status.time(self._clock.now(), precise=False)
        wanted = public_status.refused(problem, metadata["generation"], status, now)
        if "internal" in status:
            wanted["internal"] = status["internal"]
        if wanted != status:
            with contextlib.suppress(ConflictError, UnavailableError):
                self._call(self._put_status(item, wanted))
                self._events.add(item, "Warning", problem.reason, problem.text)

    def create(self, row: Row) -> Row:
        """See `Store.create`."""
        body = self._body(row) | {"metadata": {"name": row.name, "finalizers": [names.FINALIZER]}}
        made = self._call(self._cluster.create(self._mirror.path, body, manager=PERSON))
        return self._stored(made, row)

    def update(self, row: Row) -> Row:
        """See `Store.update`."""
        item = self._mirror.objects.get(row.name)
        if item is None or version_of(item) != row.revision:
            raise _conflict(row.name)
        metadata = item["metadata"]
        if row.deleting and "deletionTimestamp" not in metadata:
            path = f"{self._mirror.path}/{row.name}"
            self._call(self._cluster.delete(path, uid=metadata["uid"], resource_version=metadata["resourceVersion"]))
            return row
        known = self._read.get(row.name)
        before = self._rows.get(row.name)
        if before is not None and row.manifest != before.manifest:
            body = self._body(row)
            body["metadata"] = {"name": row.name, "resourceVersion": metadata["resourceVersion"]}
            made = self._call(self._cluster.apply(f"{self._mirror.path}/{row.name}", body, manager=PERSON))
            self._mirror.put(made)
            row = self._stored(made, row)
            item = made
            if row.status == before.status:
                return row
            known = admission.read(made, self._check)
        if known is None or known.spec is None:
            raise _conflict(row.name)
        return self._call(self._write_status(known, row, None))

    def delete(self, name: str) -> None:
        """Let go of the object: its finalizer is taken away, and the API server removes it."""
        item = self._mirror.objects.get(name)
        if item is None:
            return
        kept = [one for one in item["metadata"].get("finalizers", []) if one != names.FINALIZER]
        body = {"metadata": {"resourceVersion": item["metadata"]["resourceVersion"], "finalizers": kept}}
        self._call(self._cluster.merge(f"{self._mirror.path}/{name}", body))

    async def _write_status(self, one: Admitted, row: Row, last_action: Object | None) -> Row:
        item = one.item
        if names.FINALIZER not in item["metadata"].get("finalizers", []) and not row.deleting:
            item = await self._add_finalizer(item)
        before = (item.get("status") or {}).get("lastAction")
        assert one.spec is not None
        status = public_status.public(
            one.spec,
            row.status,
            generation=item["metadata"]["generation"],
            problem=one.problem,
            last_action=last_action or before,
            rate=row.evidence.rate,
        )
        internal = Internal(
            format=FORMAT,
            state=public_status.pack(row.status),
            evidence=public_status.pack(row.evidence),
            manifest=one.manifest_text,
            generation=one.generation,
        )
        status["internal"] = internal.model_dump()
        old = self._rows.get(row.name)
        made = await self._put_status(item, status)
        self._events.news(made, old.status if old is not None else Status(), row.status)
        stored = self._stored(made, row)
        self._rows[row.name] = stored
        return stored

    async def _add_finalizer(self, item: Object) -> Object:
        """Before the first server of a deployment is started, or its first route set."""
        metadata = item["metadata"]
        finalizers = [*metadata.get("finalizers", []), names.FINALIZER]
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"], "finalizers": finalizers}}
        made = await self._cluster.merge(f"{self._mirror.path}/{metadata['name']}", body)
        self._mirror.put(made)
        return made

    async def _put_status(self, item: Object, status: Object) -> Object:
        metadata = {key: item["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion")}
        # Labels and annotations are sent back as they are: a status write may not change them, but may not lose them either.
        metadata |= {key: item["metadata"][key] for key in ("labels", "annotations") if key in item["metadata"]}
        body = {key: item[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": metadata, "status": status}
        made = await self._cluster.replace(f"{self._mirror.path}/{metadata['name']}/status", body)
        self._mirror.put(made)
        return made

    def _stored(self, made: Object, row: Row) -> Row:
        self._mirror.put(made)
        generation = row.generation
        if row.manifest and (known := self._read.get(row.name)) is not None and known.problem is None:
            generation = made["metadata"]["generation"]
        return _with(row, revision=version_of(made), generation=generation)

    def _body(self, row: Row) -> Object:
        return {
            "apiVersion": names.API_VERSION,
            "kind": "ModelDeployment",
            "spec": dict(admission.spec_of(row.manifest)),
        }

    def load_routes(self) -> Table:
        """See `Store.load_routes`."""
        data = self._load_map()
        if "routes" not in data:
            return Table()
        routes = _ROUTES.validate_json(gzip.decompress(base64.b64decode(data["routes"])))
        return Table(int(data["generation"]), routes)

    def save_routes(self, table: Table) -> None:
        """See `Store.save_routes`."""
        packed = base64.b64encode(gzip.compress(_ROUTES.dump_json(table.routes), 6, mtime=0)).decode("ascii")
        self._call(self._save_map({"generation": str(table.generation), "routes": packed}))

    def load_gateways(self) -> dict[str, GatewaySeen]:
        """See `Store.load_gateways`."""
        data = self._load_map()
        found = _GATEWAYS.validate_json(data["gateways"]) if "gateways" in data else {}
        return {name: GatewaySeen(applied, seen_at) for name, (applied, seen_at) in found.items()}

    def save_gateways(self, seen: dict[str, GatewaySeen]) -> None:
        """See `Store.save_gateways`; `run` writes them within `GATEWAYS_SAVE_S`."""
        self._gateways = seen
        self._loop.call_soon_threadsafe(self._gateways_dirty.set)

    async def run(self, stop: asyncio.Event) -> None:
        """Write the gateways heard of when they change, until `stop`."""
        ended = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                dirty = asyncio.create_task(self._gateways_dirty.wait())
                await asyncio.wait({ended, dirty}, return_when=asyncio.FIRST_COMPLETED)
                dirty.cancel()
                if not self._gateways_dirty.is_set():
                    continue
                self._gateways_dirty.clear()
                packed = {name: (seen.applied, seen.seen_at) for name, seen in self._gateways.items()}
                try:
                    await self._save_map({"gateways": _GATEWAYS.dump_json(packed).decode()})
                except (ApiError, NotLeaderError) as error:
                    log.warning("gateways are not saved: %s", error)
                    self._gateways_dirty.set()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), GATEWAYS_SAVE_S)
        finally:
            ended.cancel()

    def _load_map(self) -> dict[str, str]:
        found = self._call(self._get_map())
        return dict(found.get("data") or {})

    async def _get_map(self) -> Object:
        try:
            return await self._cluster.get(f"{self._maps}/{self._map}")
        except ApiError as error:
            if error.status == 404:
                return {}
            raise

    async def _save_map(self, data: dict[str, str]) -> None:
        try:
            await self._cluster.merge(f"{self._maps}/{self._map}", {"data": data})
        except ApiError as error:
            if error.status != 404:
                raise
            labels = {"app.kubernetes.io/managed-by": "millrace", "app.kubernetes.io/part-of": "millrace"}
            body: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": self._map, "labels": labels}}
            await self._cluster.create(self._maps, body | {"data": data})

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in the event loop, from a thread; the API server's refusals become this service's errors."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(CALL_TIMEOUT_S)
        except ApiError as error:
            raise _error(error) from error
        except NotLeaderError as error:
            raise UnavailableError("NOT_LEADER", str(error)) from error
        except TimeoutError as error:
            future.cancel()
            raise UnavailableError("API_SERVER_UNAVAILABLE", "the API server did not answer in time") from error

    def close(self) -> None:
        """Nothing is held here."""


def _said(item: Object, problem: Problem) -> bool:
    """Whether the status names the problem already."""
    status = item.get("status") or {}
    return status.get("waiting") == problem.text and status.get("observedGeneration") == item["metadata"]["generation"]


def _with(row: Row, **values: object) -> Row:
    return Row(**({name: getattr(row, name) for name in Row.__slots__} | values))


def _conflict(name: str) -> ConflictError:
    return ConflictError("DEPLOYMENT_CHANGED", "it was changed meanwhile; try again", {"name": name})


def _error(error: ApiError) -> Exception:
    if error.status in {404, 409}:
        return ConflictError("DEPLOYMENT_CHANGED", error.message, {})
    if error.status in {400, 422}:
        field, problem = error.causes[0] if error.causes else ("manifest_yaml", error.message)
        return InvalidArgumentError(field or "manifest_yaml", problem)
    return UnavailableError("API_SERVER_UNAVAILABLE", f"the API server: {error.message}"[:500])
