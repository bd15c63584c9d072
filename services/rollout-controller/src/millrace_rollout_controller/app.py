"""The only wiring of the rollout controller."""

import asyncio
from pathlib import Path

from millrace_api.rollout.v1 import rollout_pb2_grpc
from millrace_kit.client import open_channel
from millrace_kit.clock import Clock, SystemClock
from millrace_kit.entry import run_service
from millrace_kit.server import Service, Worker

from millrace_rollout_controller.controller import Controller
from millrace_rollout_controller.deployments import Deployments
from millrace_rollout_controller.hub import Hub
from millrace_rollout_controller.local_executor import LocalExecutor
from millrace_rollout_controller.peers import Figures, Registry
from millrace_rollout_controller.reconciler import Limits
from millrace_rollout_controller.prometheus import Prometheus
from millrace_rollout_controller.servicer import RolloutServicer
from millrace_rollout_controller.settings import RolloutSettings
from millrace_rollout_controller.store import Store


async def build(settings: RolloutSettings, *, clock: Clock | None = None) -> Service:
    """The service, ready to run."""
    clock = clock or SystemClock()
    store = await asyncio.to_thread(Store.open, settings.database_url)
    table = await asyncio.to_thread(store.load_routes)
    gateways = await asyncio.to_thread(store.load_gateways)
    hub = Hub(table, gateways, forget_s=settings.gateway_forget_s, ack_s=settings.gateway_ack_s)

    registry_channel = open_channel(settings.registry_address, tls=settings.tls)
    drift_channel = open_channel(settings.drift_address, tls=settings.tls)
    gateway_channels = {a: open_channel(a, tls=settings.tls) for a in settings.gateway_addresses}
    registry = Registry(
        registry_channel,
        clock,
        timeout_s=settings.registry_timeout_s,
        artifact_timeout_s=settings.artifact_timeout_s,
    )
    figures = Figures(gateway_channels, drift_channel, timeout_s=settings.poll_timeout_s)

    executor = LocalExecutor(
        Path(settings.state_dir) / "rollout",
        settings.triton,
        registry,
        clock,
        drain_s=settings.drain_s,
        stop_on_close=settings.stop_servers_on_exit,
    )
    controller = Controller(
        store=store,
        hub=hub,
        executor=executor,
        registry=registry,
        figures=figures,
        clock=clock,
        limits=Limits(drain_s=settings.drain_s),
        tick_s=settings.tick_s,
        poll_s=settings.poll_s,
        prometheus=Prometheus(settings.prometheus, clock),
    )
    deployments = Deployments(store, executor, clock, max_deployments=settings.max_deployments)
    servicer = RolloutServicer(deployments, controller, hub, clock, max_gateways=settings.max_gateways)

    async def close_store() -> None:
        await asyncio.to_thread(store.close)

    return Service(
        "rollout-controller",
        [lambda server: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server)],
        ["millrace_api.rollout.v1.RolloutService"],
        [Worker("reconcile", controller.run), Worker("poll", controller.poll)],
        [
            close_store,
            registry_channel.close,
            drift_channel.close,
            *(channel.close for channel in gateway_channels.values()),
            executor.close,
        ],
    )


def main() -> None:
    """Entry point `millrace-rollout-controller`."""
    run_service("rollout-controller", RolloutSettings, build)
