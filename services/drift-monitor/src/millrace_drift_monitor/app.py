"""Wiring of the drift monitor."""

import asyncio

from millrace_api.drift.v1 import drift_pb2_grpc
from millrace_kit.bus import open_bus
from millrace_kit.client import open_channel
from millrace_kit.clock import Clock, IdSource, SystemClock, uuid7
from millrace_kit.entry import run_service
from millrace_kit.outbox import Relay
from millrace_kit.server import Service, Worker

from millrace_drift_monitor.answers import Answers
from millrace_drift_monitor.catalog import Catalog
from millrace_drift_monitor.closing import Closer
from millrace_drift_monitor.monitor import Monitor, count_applied
from millrace_drift_monitor.records import MICROS
from millrace_drift_monitor.retention import Cleaner
from millrace_drift_monitor.servicer import DriftServicer
from millrace_drift_monitor.settings import DriftSettings
from millrace_drift_monitor.store import Store
from millrace_drift_monitor.tables import OUTBOX
from millrace_drift_monitor.windows import ClosingRule


async def build(settings: DriftSettings, *, clock: Clock | None = None, new_id: IdSource = uuid7) -> Service:
    """Wire the service."""
    clock = clock or SystemClock()
    store = await asyncio.to_thread(Store.open, settings.database_url, settings.window_s * MICROS)
    answers = Answers(store)
    bus = await open_bus(settings.bus)
    relay = Relay(store.engine, OUTBOX, bus)
    rule = ClosingRule(
        lateness_us=settings.lateness_s * MICROS,
        horizon_us=settings.watermark_horizon_s * MICROS,
        idle_us=int(settings.idle_close_s * MICROS),
    )
    closer = Closer(store, rule, settings.thresholds, settings.min_count, new_id)
    monitor = Monitor(
        bus, store, closer, clock, fetch_messages=settings.fetch_messages, max_ahead_s=settings.max_ahead_s
    )
    channel = open_channel(settings.registry_address, timeout_s=settings.registry_timeout_s, tls=settings.tls)
    catalog = Catalog(store, channel, clock, settings.registry_retry_s, count_applied)
    cleaner = Cleaner(store, answers, settings.retention, clock)
    servicer = DriftServicer(store, answers, closer, relay=relay, settings=settings, clock=clock)

    async def close_store() -> None:
        await asyncio.to_thread(store.engine.dispose)

    async def close_channel() -> None:
        await channel.close()

    return Service(
        "drift-monitor",
        [lambda server: drift_pb2_grpc.add_DriftServiceServicer_to_server(servicer, server)],
        ["millrace_api.drift.v1.DriftService"],
        [
            Worker("drift-stream", monitor.run),
            Worker("drift-catalog", catalog.run),
            Worker("drift-retention", cleaner.run),
            relay.worker,
        ],
        [close_store, bus.close, close_channel],
    )


def main() -> None:
    """Run `millrace-drift-monitor`."""
    run_service("drift-monitor", DriftSettings, build)
