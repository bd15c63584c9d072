"""The only wiring of the rollout controller: on one machine, or in a cluster."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from millrace_api.rollout.v1 import rollout_pb2_grpc
from millrace_kit.client import open_bare_channel, open_channel, target_options
from millrace_kit.clock import Clock, SystemClock
from millrace_kit.entry import run_service
from millrace_kit.server import Service, Worker

from millrace_rollout_controller.controller import Controller
from millrace_rollout_controller.deployments import Deployments
from millrace_rollout_controller.executor import Executor
from millrace_rollout_controller.hub import Hub, Table
from millrace_rollout_controller.local_executor import LocalExecutor
from millrace_rollout_controller.peers import Figures, Registry
from millrace_rollout_controller.plans import Limits
from millrace_rollout_controller.prometheus import Prometheus
from millrace_rollout_controller.server_figures import ServerFigures
from millrace_rollout_controller.servicer import RolloutServicer
from millrace_rollout_controller.settings import RolloutSettings
from millrace_rollout_controller.sql_store import SqlStore
from millrace_rollout_controller.store import Store
from millrace_rollout_controller.warming import Warmer


@dataclass(frozen=True)
class _Place:
    """Where deployments are kept and servers run."""

    store: Store
    executor: Executor
    hub: Hub
    around: Callable[[Controller], Sequence[Worker]]
    """The workers that run the controller."""
    closers: Sequence[Callable[[], Awaitable[None]]]
    trial_save_s: float = 0.0


async def build(settings: RolloutSettings, *, clock: Clock | None = None) -> Service:
    """The service, ready to run."""
    clock = clock or SystemClock()
    registry_channel = open_channel(settings.registry_address, tls=settings.tls)
    drift_channel = open_channel(settings.drift_address, tls=settings.tls)
    registry = Registry(
        registry_channel,
        clock,
        timeout_s=settings.registry_timeout_s,
        artifact_timeout_s=settings.artifact_timeout_s,
    )
    place = await (
        _this_machine(settings, registry, clock) if settings.kubernetes is None else _cluster(settings, clock)
    )
    figures = Figures(
        settings.gateway_addresses,
        place.hub.figures_addresses,
        lambda address: open_pod(settings, address, settings.gateway_tls_name),
        drift_channel,
        timeout_s=settings.poll_timeout_s,
    )
    server_figures = ServerFigures(timeout_s=settings.poll_timeout_s)
    controller = Controller(
        store=place.store,
        hub=place.hub,
        executor=place.executor,
        registry=registry,
        figures=figures,
        clock=clock,
        limits=Limits(drain_s=settings.drain_s),
        tick_s=settings.tick_s,
        poll_s=settings.poll_s,
        prometheus=Prometheus(settings.prometheus, clock),
        namespace=settings.kubernetes.namespace if settings.kubernetes is not None else "",
        trial_save_s=place.trial_save_s,
        warmer=Warmer(figures, clock),
        server_figures=server_figures,
    )
    deployments = Deployments(place.store, place.executor, clock, max_deployments=settings.max_deployments)
    servicer = RolloutServicer(deployments, controller, place.hub, clock, max_gateways=settings.max_gateways)
    return Service(
        "rollout-controller",
        [lambda server: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server)],
        ["millrace_api.rollout.v1.RolloutService"],
        [*place.around(controller), Worker("poll", controller.poll)],
        [
            *place.closers,
            registry_channel.close,
            drift_channel.close,
            figures.close,
            server_figures.close,
            place.executor.close,
        ],
    )


async def _this_machine(settings: RolloutSettings, registry: Registry, clock: Clock) -> _Place:
    store = await asyncio.to_thread(SqlStore.open, settings.database_url)
    table = await asyncio.to_thread(store.load_routes)
    gateways = await asyncio.to_thread(store.load_gateways)
    hub = Hub(table, gateways, forget_s=settings.gateway_forget_s, ack_s=settings.gateway_ack_s)
    executor = LocalExecutor(
        Path(settings.state_dir) / "rollout",
        settings.triton,
        registry,
        clock,
        drain_s=settings.drain_s,
        stop_on_close=settings.stop_servers_on_exit,
    )

    async def close_store() -> None:
        await asyncio.to_thread(store.close)

    return _Place(store, executor, hub, lambda controller: [Worker("reconcile", controller.run)], [close_store])


async def _cluster(settings: RolloutSettings, clock: Clock) -> _Place:
    # A second and 60 MiB of client that one machine has no use for.
    from millrace_rollout_controller.kubernetes import wiring

    assert settings.kubernetes is not None
    hub = Hub(Table(), {}, forget_s=settings.gateway_forget_s, ack_s=settings.gateway_ack_s)
    hub.serving = False
    name = settings.kubernetes.fetch.loader_tls_name
    parts = await wiring.connect(
        settings.kubernetes,
        hub,
        clock,
        lambda address: open_pod(settings, address, name),
        limit=settings.max_deployments,
    )
    return _Place(parts.store, parts.executor, hub, parts.workers, parts.closers, settings.kubernetes.evidence_save_s)


def open_pod(settings: RolloutSettings, address: str, name: str) -> grpc.aio.Channel:
    """A channel to the address of a pod, whose certificate has another name."""
    if settings.tls is None or not name:
        return open_channel(address, tls=settings.tls)
    options = [*target_options(address), ("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)]
    return open_bare_channel(address, options, tls=settings.tls)


def main() -> None:
    """Entry point `millrace-rollout-controller`."""
    run_service("rollout-controller", RolloutSettings, build)
