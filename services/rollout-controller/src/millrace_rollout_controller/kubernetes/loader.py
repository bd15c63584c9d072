"""`millrace-model-loader`: stands beside a model server that holds several versions, in its pod, and brings them in and out.

What to hold it reads from a file of the deployment's ConfigMap, so that a pod that starts needs no controller; a running one is told of a
newer document by the controller first. It is ready, and with it the pod, while the server holds what stable needs.
"""

import asyncio
import contextlib
import logging
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import psutil
from millrace_api.rollout.v1 import loader_pb2, loader_pb2_grpc
from millrace_kit.client import open_channel
from millrace_kit.clock import Clock, SystemClock
from millrace_kit.entry import run_service
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from millrace_kit.server import Service, Worker
from pydantic import ValidationError

from millrace_rollout_controller import memory, repository, triton
from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.kept_files import KeptFiles
from millrace_rollout_controller.kubernetes import names
from millrace_rollout_controller.kubernetes.order import MODELS, ORDERS_FILE, ORDERS_FOLDER, Order, Orders
from millrace_rollout_controller.peers import Registry
from millrace_rollout_controller.plans import INSUFFICIENT_MEMORY
from millrace_rollout_controller.probe import Probe
from millrace_rollout_controller.replica import Record
from millrace_rollout_controller.settings import RolloutSettings
from millrace_rollout_controller.shared_server import LOOK_S, SharedServer

log = logging.getLogger(__name__)
ARTIFACTS = ".artifacts"
"""Folder of kept files, beside the repository."""
FOLLOWED = ".orders.json"
"""What was followed last: a loader that restarts must not go back to a file that the kubelet has yet to renew."""
READ_S = 1.0
"""Time between two looks at the file of the orders."""
METRICS_TIMEOUT_S = 2.0
"""Longest wait for the server's metrics."""
_SERVER = "tritonserver"


@dataclass(frozen=True)
class Place:
    """Where everything is in the pod."""

    orders: Path = Path(ORDERS_FOLDER) / ORDERS_FILE
    models: Path = Path(MODELS)
    server_port: int = names.GRPC
    listen_port: int = names.LOADER
    probes_port: int = names.LOADER_PROBES
    memory_limit: str | None = None
    """Of the server's container, in bytes; None for none."""

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Place":
        """From the pod's variables; those that are absent leave the default."""
        found = cls()
        return cls(
            Path(environment.get("MILLRACE_ORDERS", found.orders)),
            Path(environment.get("MILLRACE_MODELS", found.models)),
            int(environment.get("MILLRACE_SERVER_PORT", found.server_port)),
            int(environment.get("MILLRACE_LOADER_PORT", found.listen_port)),
            int(environment.get("MILLRACE_PROBES_PORT", found.probes_port)),
            environment.get("MILLRACE_MEMORY_LIMIT") or None,
        )


class Neighbour:
    """The server's process in the next container, which somebody else starts; see `shared_server.Process`.

    Args:
        port: of its gRPC, on this pod's own address.
        order: any of its versions.
        probe_s: deadline of a question, and time between two.
    """

    retiring = False

    def __init__(self, port: int, order: Order, probe_s: float) -> None:
        self.endpoint = f"127.0.0.1:{port}"
        self.record = Record("", "", order.ref.model, order.ref.version, "", port)
        self.ready = False
        self.trouble = ""
        self._probe = Probe(self.endpoint, order.ref, shared=True)
        self._probe_s = probe_s

    async def run(self) -> None:
        """Watch the process until cancelled."""
        try:
            while True:
                record = await asyncio.to_thread(self._find)
                self.ready = bool(record.pid) and await self._probe.live(self._probe_s)
                self.record = record
                await asyncio.sleep(LOOK_S if not self.ready else self._probe_s)
        finally:
            await self._probe.close()

    def _find(self) -> Record:
        """The process that listens there, by its command line; the pod's containers see each other's processes."""
        known = self.record
        if triton.runs(known.pid, known.since):
            return known
        mark = f"--grpc-port={known.port}"
        running = (one for one in psutil.process_iter(["name", "cmdline"]) if one.info["name"] == _SERVER)
        found = [one.pid for one in running if mark in (one.info["cmdline"] or ())]
        pid = found[0] if len(found) == 1 else 0
        self.trouble = "" if pid else f"{len(found)} processes {_SERVER} with {mark} run"
        return Record("", "", known.model, known.version, "", known.port, pid, triton.started_at(pid) or 0.0)


class Loader:
    """Follows the orders.

    Args:
        place: where everything is.
        orders: the first ones.
        server: what carries them out.
        process: its server.
        files: where they come from.
    """

    def __init__(
        self, place: Place, orders: Orders, server: SharedServer, process: Neighbour, files: KeptFiles
    ) -> None:
        self._place = place
        self._orders = orders
        self._server = server
        self._process = process
        self._files = files
        self._settled: tuple[int, float] | None = None
        self._follow(orders)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`; what the server holds stays there."""
        tasks = [asyncio.create_task(self._process.run()), asyncio.create_task(self._server.run())]
        try:
            while not stop.is_set():
                self._read()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), READ_S)
                for task in tasks:
                    if task.done():
                        task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def ready(self) -> bool:
        """Whether the server holds what stable needs, and since its start had a try at everything else."""
        if not self._server.complete:
            return False
        record = self._process.record
        if self._settled != (record.pid, record.since):
            if not self._server.settled:
                return False
            self._settled = record.pid, record.since
        return True

    def hold(self, orders: Orders) -> None:
        """Follow these, unless they are older than what is known."""
        if orders.revision > self._orders.revision:
            self._follow(orders)

    def holding(self) -> loader_pb2.HoldResponse:
        """What is in the server now."""
        answer = loader_pb2.HoldResponse(revision=self._orders.revision)
        for version, one in sorted(self._server.held.items()):
            refusal = one.refusal
            answer.versions.add(
                version=version,
                digest=one.want.ref.digest,
                loaded=one.loaded,
                ready=one.ready and self._process.ready,
                reason=refusal.reason if refusal else "",
                message=refusal.message if refusal else "",
                permanent=refusal.permanent if refusal else False,
            )
        return answer

    def _read(self) -> None:
        try:
            self.hold(read_orders(self._place.orders))
        except UnavailableError as error:
            log.warning("%s; what is known stays", error.message)

    def _follow(self, orders: Orders) -> None:
        log.info("revision %d: %s", orders.revision, ", ".join(one.ref.version for one in orders.versions))
        self._orders = orders
        scratch = self._place.models / f"{FOLLOWED}.new"
        scratch.write_text(orders.model_dump_json(), encoding="utf-8")
        scratch.replace(self._place.models / FOLLOWED)
        self._server.wanted = {one.ref.version: Wanted("", one.ref, 1, one.server) for one in orders.versions}
        self._files.forget_all_but({artifact.sha256 for one in orders.versions for artifact in one.ref.artifacts})


class LoaderServicer(loader_pb2_grpc.LoaderServiceServicer):
    """The controller's side of it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    async def Hold(
        self,
        request: loader_pb2.HoldRequest,
        context: grpc.aio.ServicerContext,  # noqa: ARG002 - gRPC's signature
    ) -> loader_pb2.HoldResponse:
        """See the service."""
        if request.document:
            try:
                self._loader.hold(Orders.model_validate_json(request.document))
            except ValidationError as error:
                raise InvalidArgumentError("document", str(error)[:800]) from error
        return self._loader.holding()


def read_orders(path: Path) -> Orders:
    """The orders in a file.

    Raises:
        UnavailableError: they cannot be read now.
    """
    try:
        return Orders.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UnavailableError("ORDERS_UNREADABLE", f"{path}: {str(error)[:800]}") from error


def _newest(place: Place) -> Orders:
    """What to begin with: the file's, or what a loader before followed last."""
    orders = read_orders(place.orders)
    with contextlib.suppress(UnavailableError):
        orders = max(orders, read_orders(place.models / FOLLOWED), key=lambda one: one.revision)
    return orders


def begin_repository(root: Path, order: Order) -> None:
    """Make the folder of the model with its configuration, unless a loader before did: it stays as it is for the server's life."""
    if not (root / order.ref.model / "config.pbtxt").exists():
        root.mkdir(parents=True, exist_ok=True)
        repository.write_shared(root, order.ref, order.server, order.flavour)


def free_bytes(pid: int, place: Place, *, gpu: bool) -> int:
    """Memory for one more version: of the fullest GPU where the server `pid` runs on them, else of its container's limit and the node.

    Raises:
        FailedPreconditionError: the server says nothing of its GPUs; no version joins another one then.
    """
    if not gpu:
        return memory.free_bytes(pid, place.memory_limit, own_container=False)
    try:
        url = f"http://127.0.0.1:{place.server_port + 1}/metrics"
        with urllib.request.urlopen(url, timeout=METRICS_TIMEOUT_S) as page:
            return memory.gpu_free_bytes(page.read().decode(errors="replace"))
    except (OSError, ValueError) as error:
        message = f"the free memory of the server's GPUs is not known: {error}"
        raise FailedPreconditionError(INSUFFICIENT_MEMORY, message) from error


async def build(settings: RolloutSettings, place: Place, clock: Clock | None = None) -> Service:
    """The loader, ready to run.

    Raises:
        UnavailableError: there are no orders.
    """
    clock = clock or SystemClock()
    orders = await asyncio.to_thread(_newest, place)
    first = orders.versions[0]
    await asyncio.to_thread(begin_repository, place.models, first)
    channel = open_channel(settings.registry_address, tls=settings.tls)
    registry = Registry(
        channel, clock, timeout_s=settings.registry_timeout_s, artifact_timeout_s=settings.artifact_timeout_s
    )
    files = KeptFiles(place.models / ARTIFACTS, registry)
    process = Neighbour(place.server_port, first, settings.triton.probe_s)
    server = SharedServer(
        process,
        place.models,
        files,
        first.flavour,
        settings.triton,
        clock,
        # Who orders a version away has waited for the gateways already.
        drain_s=0.0,
        free_bytes=lambda _server: free_bytes(process.record.pid, place, gpu=first.gpu),
        in_use=frozenset(),
    )
    loader = Loader(place, orders, server, process, files)
    servicer = LoaderServicer(loader)

    def add(to: grpc.aio.Server) -> None:
        loader_pb2_grpc.add_LoaderServiceServicer_to_server(servicer, to)

    return Service(
        "model-loader",
        [add],
        ["millrace_api.rollout.v1.LoaderService"],
        [Worker("loader", loader.run)],
        [channel.close],
        ready=loader.ready,
    )


def adapted(settings: RolloutSettings, place: Place) -> RolloutSettings:
    """The controller's settings with addresses of the loader's own, and the controller as its only client."""
    host = settings.listen.rpartition(":")[0]
    telemetry = {"metrics_listen": f"{settings.telemetry.metrics_listen.rpartition(':')[0]}:{place.probes_port}"}
    client = settings.kubernetes.fetch.controller_tls_name if settings.kubernetes is not None else ""
    return settings.model_copy(
        update={
            "listen": f"{host}:{place.listen_port}",
            "telemetry": settings.telemetry.model_copy(update=telemetry),
            "allowed_clients": (client,) if client and settings.tls is not None else (),
        }
    )


def main() -> None:
    """Entry point."""
    place = Place.read(os.environ)
    run_service(
        "model-loader",
        RolloutSettings,
        lambda settings: build(settings, place),
        adapt=lambda settings: adapted(settings, place),
    )
