"""Wires the registry; nothing is created anywhere else."""

import asyncio
import logging
from datetime import datetime, timedelta
from pathlib import Path

from millrace_api.registry.v1 import registry_pb2_grpc
from millrace_kit.bus import open_bus
from millrace_kit.clock import Clock, SystemClock
from millrace_kit.content import ContentStore
from millrace_kit.entry import run_service
from millrace_kit.errors import DataLossError
from millrace_kit.outbox import Relay
from millrace_kit.server import Service
from millrace_kit.sql import migrate, open_engine
from prometheus_client import Gauge

from millrace_registry.artifacts import Artifacts
from millrace_registry.events import model_changed
from millrace_registry.servicer import RegistryServicer
from millrace_registry.settings import RegistrySettings
from millrace_registry.store import SqlStore
from millrace_registry.tables import OUTBOX

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).with_name("migrations")
# Uploads that were cut off are removed at a start when they are this old; no upload lasts that long.
ABANDONED_AFTER = timedelta(days=1)
AUDIT_INTACT = Gauge("millrace_registry_audit_intact", "1 when the audit trail's chain was whole at the last start.")


async def build(settings: RegistrySettings, *, clock: Clock | None = None) -> Service:
    """The registry of `settings`, ready to run: its schema is at the newest revision, its bus is open."""
    clock = clock or SystemClock()
    engine = open_engine(settings.database())
    await asyncio.to_thread(migrate, engine, MIGRATIONS)
    files = ContentStore(settings.artifacts())
    await asyncio.to_thread(_sweep, files, clock.now() - ABANDONED_AFTER)
    store = SqlStore(
        engine,
        clock,
        model_changed,
        max_models=settings.max_models,
        max_versions=settings.max_versions_per_model,
    )
    await asyncio.to_thread(_look_at_audit, store)
    bus = await open_bus(settings.bus)
    relay = Relay(engine, OUTBOX, bus)
    servicer = RegistryServicer(store, Artifacts(files, max_bytes=settings.max_artifact_mib << 20), relay.wake)

    async def close_database() -> None:
        await asyncio.to_thread(engine.dispose)

    return Service(
        "registry",
        add_servicers=[lambda server: registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server)],
        grpc_services=["millrace_api.registry.v1.RegistryService"],
        workers=[relay.worker],
        closers=[close_database, bus.close],
    )


def _sweep(files: ContentStore, older_than: datetime) -> None:
    """Left-overs do no harm, so a store that does not answer is no reason not to serve models."""
    try:
        files.sweep(older_than=older_than)
    except OSError as error:
        log.warning("left-overs of uploads were not removed: %s", error)


def _look_at_audit(store: SqlStore) -> None:
    """A trail that was tampered with is reported, not a reason to stop serving models."""
    try:
        entries = store.verify_audit()
    except DataLossError as error:
        AUDIT_INTACT.set(0)
        log.critical("%s", error)
    else:
        AUDIT_INTACT.set(1)
        log.info("the audit trail of %d entries is whole", entries)


def main() -> None:
    """Entry point `millrace-registry`."""
    run_service("registry", RegistrySettings, build)
