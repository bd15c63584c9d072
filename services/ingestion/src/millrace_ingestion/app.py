"""Wires the ingestion service; nothing is created anywhere else."""

import asyncio
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from millrace_api.ingestion.v1 import ingestion_pb2_grpc, sources_pb2_grpc
from millrace_kit.bus import open_bus
from millrace_kit.clock import Clock, SystemClock
from millrace_kit.content import lake_options
from millrace_kit.entry import run_service
from millrace_kit.server import Service, Worker
from millrace_kit.sql import migrate, open_engine

from millrace_ingestion.backup import command
from millrace_ingestion.contract_messages import contract_bytes, contract_from_bytes
from millrace_ingestion.contracts import QUARANTINE_SUFFIX, Contract
from millrace_ingestion.held_store import HeldStore
from millrace_ingestion.id_index import IdIndex
from millrace_ingestion.ingestor import Ingestor, IntakeLimits
from millrace_ingestion.intake import Budget
from millrace_ingestion.joins.registry import check_contract
from millrace_ingestion.lake import LakeTable
from millrace_ingestion.landing import CrashPoint, Landing, no_crash
from millrace_ingestion.lane import Lane, Limits
from millrace_ingestion.letter_store import LetterStore
from millrace_ingestion.letter_topic import LetterRelay
from millrace_ingestion.maintenance import Maintenance, Upkeep
from millrace_ingestion.pins import PinStore
from millrace_ingestion.quality_monitor import QualityMonitor
from millrace_ingestion.quarantine import Quarantine
from millrace_ingestion.retention import LetterRetention
from millrace_ingestion.servicer import IngestionServicer
from millrace_ingestion.settings import IngestionSettings
from millrace_ingestion.sources.servicer import SourceServicer
from millrace_ingestion.sources.store import SourceStore
from millrace_ingestion.sources.wiring import make_supervisor
from millrace_ingestion.store import Store
from millrace_ingestion.table_versions import TableVersions

MIGRATIONS = Path(__file__).with_name("migrations")
MIB = 1 << 20


async def build(
    settings: IngestionSettings, *, clock: Clock | None = None, crash_point: CrashPoint = no_crash
) -> Service:
    """The ingestion service of `settings`, ready to run; unfinished batches are recovered once it runs."""
    engine = open_engine(settings.database())
    await asyncio.to_thread(migrate, engine, MIGRATIONS)
    clock = clock or SystemClock()
    store = Store(engine, clock)
    letter_store = LetterStore(engine)
    quality = QualityMonitor(
        engine,
        clock,
        bucket=timedelta(seconds=settings.quality_bucket_s),
        keep=timedelta(days=settings.quality_retention_days),
        flush_s=settings.quality_flush_s,
        max_series=settings.max_quality_series,
    )
    bus = await open_bus(settings.bus)
    lane_limits = Limits(
        settings.max_commit_rows,
        settings.max_commit_batches,
        settings.max_commit_mib * MIB,
        settings.linger_ms / 1000,
        settings.publish_timeout_s,
    )

    def open_table(name: str) -> LakeTable:
        options = lake_options(settings.lake(), settings.lake_options)
        return LakeTable(f"{settings.lake()}/{name}", options, compact_target_bytes=settings.compact_target_mib * MIB)

    def make_lane(contract: Contract) -> Lane:
        folder = Path(settings.state_dir) / "event-ids" / contract.name
        index = IdIndex(folder, flush_ids=settings.index_flush_ids)
        landing = Landing(
            contract,
            open_table(contract.name),
            index,
            store,
            Quarantine(open_table(contract.name + QUARANTINE_SUFFIX)),
            maintain_every=settings.maintain_every_commits,
            crash_point=crash_point,
        )
        return Lane(landing, bus, lane_limits, quality)

    source_store = SourceStore(engine, clock)

    def check_joins(contract: Contract, others: Callable[[str], Contract]) -> None:
        sources = {name: source for name, (source, _standing) in source_store.sources().items()}
        check_contract(contract, sources, others)

    ingestor = Ingestor(
        store=store,
        letter_store=letter_store,
        held=HeldStore(engine, clock),
        quality=quality,
        contracts=[contract_from_bytes(version, body) for version, body in await asyncio.to_thread(store.contracts)],
        make_lane=make_lane,
        serialize=contract_bytes,
        deserialize=contract_from_bytes,
        budget=Budget(settings.max_queued_batches, settings.max_queued_mib * MIB),
        limits=IntakeLimits(
            settings.max_contracts,
            settings.max_batch_rows,
            settings.max_batch_mib * MIB,
            settings.max_dead_letters,
            settings.replay_rows,
        ),
        letters=await asyncio.to_thread(letter_store.kept),
        clock=clock,
        guard=check_joins,
    )
    pins = PinStore(engine, clock)
    versions = TableVersions(ingestor, pins)
    servicer = IngestionServicer(ingestor, versions, stream_window=settings.stream_window)

    days, count = settings.dead_letter_retention_days, settings.dead_letter_retention_count
    retention = LetterRetention(
        letter_store,
        clock,
        max_age=timedelta(days=days) if days else None,
        keep=count or None,
        published=settings.dead_letter_topics,
        removed=ingestor.forget_letters,
        every_s=settings.housekeeping_every_s,
    )
    workers = [Worker("landing", ingestor.run), Worker("dead-letter-retention", retention.run)]
    upkeep = Upkeep(settings.z_order, settings.vacuum_retention_h, settings.log_retention_h)
    maintenance = Maintenance(ingestor, pins, upkeep, every_s=settings.maintenance_every_s)
    workers += [Worker("quality", quality.run), Worker("maintenance", maintenance.run)]
    if settings.dead_letter_topics:
        workers.append(Worker("dead-letter-topic", LetterRelay(letter_store, bus, clock).run))

    supervisor = make_supervisor(
        settings, engine, source_store, ingestor, clock, open_table=open_table, crash_point=crash_point
    )
    sources = SourceServicer(supervisor, ingestor)

    async def close_database() -> None:
        await asyncio.to_thread(engine.dispose)

    return Service(
        "ingestion",
        add_servicers=[
            lambda server: ingestion_pb2_grpc.add_IngestionServiceServicer_to_server(servicer, server),
            lambda server: sources_pb2_grpc.add_SourceServiceServicer_to_server(sources, server),
        ],
        grpc_services=["millrace_api.ingestion.v1.IngestionService", "millrace_api.ingestion.v1.SourceService"],
        workers=[*workers, Worker("sources", supervisor.run)],
        closers=[close_database, bus.close],
    )


def main() -> None:
    """Entry point `millrace-ingestion`: runs the service, or one of the commands of backups."""
    if sys.argv[1:2] and sys.argv[1] in command.COMMANDS:
        raise SystemExit(command.run(sys.argv[1:]))
    run_service("ingestion", IngestionSettings, build)
