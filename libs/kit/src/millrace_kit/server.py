"""Runs one service: gRPC server with health and reflection, background workers, orderly shutdown."""

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.instrumentation.grpc import aio_server_interceptor

from millrace_kit.client import channel_options
from millrace_kit.errors import UnavailableError
from millrace_kit.interceptors import ServerEdge
from millrace_kit.probes import DRAINING, Probes
from millrace_kit.processes import own_number
from millrace_kit.settings import ServiceSettings
from millrace_kit.telemetry import WORKER_FAILURES, WORKER_RETRIES
from millrace_kit.tls import CertificateFiles

log = logging.getLogger(__name__)

# Time between two looks at whether the service is ready; each also shows that the event loop turns.
PULSE_S = 0.25
NOT_READY = "the service is not ready"
# Waits before a worker is run again; they double, and start anew once a worker ran longer than the longest.
WORKER_RETRY_MIN_S = 0.2
WORKER_RETRY_MAX_S = 5.0


@dataclass(frozen=True)
class Worker:
    """A background task that runs until `stop` is set.

    Where something it needs does not answer (`UnavailableError`) it is run again after a wait, in the same process: while a database is
    away, the calls that need none are still answered. If it raises anything else, the process ends and its supervisor starts it anew.
    """

    name: str
    run: Callable[[asyncio.Event], Awaitable[None]]


@dataclass(frozen=True)
class Service:
    """A wired service, ready to run; `app.build` makes it."""

    name: str
    """For example "registry"."""
    add_servicers: Sequence[Callable[[grpc.aio.Server], None]] = ()
    """Each adds one servicer to the server."""
    grpc_services: Sequence[str] = ()
    """Full names of these services, for health and reflection."""
    workers: Sequence[Worker] = ()
    closers: Sequence[Callable[[], Awaitable[None]]] = field(default=())
    """Called in reverse order at the end."""
    ready: Callable[[], bool] | None = None
    """Whether it takes work now, asked in the event loop a few times a second: it must not wait. Health follows the answer.
    None is ready from start to shutdown."""
    quiet_methods: frozenset[str] = frozenset()
    """Methods (`/package.Service/Method`) that begin no trace of their own: a span costs more than they do. A caller's trace is
    followed into them."""
    linger: Callable[[], Awaitable[None]] | None = None
    """Awaited after SIGTERM while everything still runs and health says no, for a service whose callers have to end first. It has to
    end by itself."""


class WorkerFailedError(Exception):
    """A background worker ended with an error."""


@asynccontextmanager
async def running(service: Service, settings: ServiceSettings, probes: Probes | None = None) -> AsyncIterator[str]:
    """Run `service` while the context is open; yields the bound `host:port`. A worker's failure is raised at the end.

    gRPC health and `probes` (which outlive the call) say the same at any time.
    """
    probes = probes or Probes()
    stop = asyncio.Event()
    server = grpc.aio.server(
        interceptors=[
            aio_server_interceptor(filter_=_traced(service.quiet_methods)),  # type: ignore[no-untyped-call]
            ServerEdge(
                default_deadline_s=settings.default_deadline_s,
                max_concurrent=settings.max_concurrent_rpcs,
                allowed_clients=settings.allowed_clients,
            ),
        ],
        options=_options(settings),
    )
    for add in service.add_servicers:
        add(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*service.grpc_services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    address = _bind(server, settings)
    await server.start()
    tasks = [asyncio.create_task(_guard(worker, stop), name=worker.name) for worker in service.workers]
    pulse = _Pulse(service, health_servicer, probes)
    await pulse.look()
    pulse_task = asyncio.create_task(pulse.run(), name="pulse")
    log.info("%s listens on %s", service.name, address)
    try:
        yield address
    finally:
        pulse_task.cancel()
        await asyncio.gather(pulse_task, return_exceptions=True)
        probes.not_ready(DRAINING)
        await health_servicer.enter_graceful_shutdown()
        await asyncio.sleep(settings.shutdown_delay_s)
        if service.linger is not None:
            await service.linger()
        stop.set()
        await server.stop(settings.drain_s)
        _done, pending = await asyncio.wait(tasks, timeout=settings.drain_s) if tasks else (set(), set())
        for task in pending:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for close in reversed(service.closers):
            await close()
        for result in results:
            if isinstance(result, WorkerFailedError):
                raise result


def _traced(quiet_methods: frozenset[str]) -> Callable[[grpc.HandlerCallDetails], bool]:
    """Whether a call gets a span: always, but quiet methods only in a trace that the caller records."""

    def is_traced(details: grpc.HandlerCallDetails) -> bool:
        if details.method not in quiet_methods:
            return True
        # The last field of W3C's traceparent holds flags, the lowest bit of which says that the trace is recorded.
        parent = next((value for key, value in details.invocation_metadata or () if key == "traceparent"), "")
        return parent[-1:] in set("13579bdf")

    return is_traced


class _Pulse:
    """Asks the service whether it is ready and tells gRPC health and the probes when that changes."""

    def __init__(self, service: Service, servicer: health.aio.HealthServicer, probes: Probes) -> None:
        self._service = service
        self._servicer = servicer
        self._probes = probes
        self._told: bool | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(PULSE_S)
            await self.look()

    async def look(self) -> None:
        """Ask once."""
        self._probes.beat()
        ready = self._ask()
        if ready == self._told:
            return
        if self._told is not None:
            log.log(
                logging.INFO if ready else logging.WARNING,
                "%s is %s",
                self._service.name,
                "ready" if ready else "not ready",
            )
        self._told = ready
        if ready:
            self._probes.ready()
        else:
            self._probes.not_ready(NOT_READY)
        status = health_pb2.HealthCheckResponse
        for name in ("", *self._service.grpc_services):
            await self._servicer.set(name, status.SERVING if ready else status.NOT_SERVING)

    def _ask(self) -> bool:
        if self._service.ready is None:
            return True
        try:
            return self._service.ready()
        except Exception:
            if self._told is not False:
                log.exception("%s could not say whether it is ready", self._service.name)
            return False


async def _guard(worker: Worker, stop: asyncio.Event) -> None:
    try:
        await _persevere(worker, stop)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        WORKER_FAILURES.labels(worker.name).inc()
        log.exception("worker %s failed", worker.name)
        raise WorkerFailedError(worker.name) from error


async def _persevere(worker: Worker, stop: asyncio.Event) -> None:
    wait_s = WORKER_RETRY_MIN_S
    while True:
        began = time.monotonic()
        try:
            return await worker.run(stop)
        except UnavailableError as error:
            if time.monotonic() - began > WORKER_RETRY_MAX_S:
                wait_s = WORKER_RETRY_MIN_S
            WORKER_RETRIES.labels(worker.name).inc()
            log.warning("worker %s starts again in %.1f s: %s", worker.name, wait_s, error)
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await stop.wait()
        if stop.is_set():
            return None
        wait_s = min(WORKER_RETRY_MAX_S, wait_s * 2)


def _options(settings: ServiceSettings) -> list[tuple[str, int | str]]:
    options = [*channel_options(settings.max_message_mib), ("grpc.so_reuseport", int(own_number() is not None))]
    if settings.max_connection_age_s:
        options.append(("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)))
    return options


def _bind(server: grpc.aio.Server, settings: ServiceSettings) -> str:
    host = settings.listen.rpartition(":")[0]
    if settings.tls is None:
        port = server.add_insecure_port(settings.listen)
    else:
        port = server.add_secure_port(settings.listen, CertificateFiles(settings.tls).server_credentials())
    return f"{host}:{port}"


async def serve(service: Service, settings: ServiceSettings, probes: Probes | None = None) -> None:
    """Run `service` until SIGTERM, SIGINT or the failure of a worker.

    Raises:
        WorkerFailedError: a worker failed; the caller ends the process with a non-zero status.
    """
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)

    def watched(worker: Worker) -> Worker:
        async def run(stop: asyncio.Event) -> None:
            try:
                await worker.run(stop)
            except UnavailableError:
                raise
            except Exception:
                ended.set()
                raise

        return Worker(worker.name, run)

    guarded = replace(service, workers=[watched(w) for w in service.workers])
    async with running(guarded, settings, probes):
        await ended.wait()
        log.info("%s stops", service.name)
