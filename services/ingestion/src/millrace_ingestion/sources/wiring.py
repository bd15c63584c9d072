"""Makes the sources of one service; `app.py` calls it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from millrace_kit.clock import Clock, uuid7
from sqlalchemy import Engine

from millrace_ingestion.joins.join_source import CrashPoint, JoinLanes, JoinLimits, JoinSource
from millrace_ingestion.joins.registry import Contracts, check_join, prepare_join
from millrace_ingestion.joins.specs import JoinSpec
from millrace_ingestion.joins.store import JoinStore
from millrace_ingestion.lake import LakeTable
from millrace_ingestion.settings import IngestionSettings
from millrace_ingestion.sources.connections import Connections
from millrace_ingestion.sources.file_source import FileLimits, FileSource
from millrace_ingestion.sources.lease import Lease
from millrace_ingestion.sources.specs import Progress, Source, Standing, TopicSpec
from millrace_ingestion.sources.store import SourceStore
from millrace_ingestion.sources.supervisor import Runner, Supervisor, SupervisorLimits
from millrace_ingestion.sources.topic_reader import Edge, Place, ReaderLimits, TopicReader
from millrace_ingestion.sources.topic_source import TopicLimits, TopicSource

MIB = 1 << 20
# Room for a landing that opens its table, or that waits for a slow bus, when partitions come and go.
_RELEASE_S = 60.0


class Lanes(JoinLanes, Contracts, Protocol):
    """What is used of the ingestor."""


def make_supervisor(
    settings: IngestionSettings,
    engine: Engine,
    store: SourceStore,
    lanes: Lanes,
    clock: Clock,
    *,
    open_table: Callable[[str], LakeTable],
    crash_point: CrashPoint,
) -> Supervisor:
    """The sources of `settings`, not yet running."""
    join_store = JoinStore(engine)
    connections = Connections(
        settings.source_connections,
        settings.source_inline_brokers,
        settings.source_locations,
        settings.source_timeout_s,
        settings.max_schemas,
        clock,
    )
    reading = ReaderLimits(
        settings.source_batch_records,
        settings.source_batch_mib * MIB,
        settings.source_buffer_mib * 1024,
        settings.source_linger_ms / 1000,
        settings.source_timeout_s,
    )
    files = FileLimits(
        settings.source_batch_records,
        settings.source_batch_mib * MIB,
        settings.source_window,
        settings.source_attempts,
        settings.source_retry_max_s,
        settings.max_source_files,
    )
    topics = TopicLimits(settings.source_batch_mib * MIB, settings.source_window, _RELEASE_S)

    joining = JoinLimits(
        settings.join_step_records,
        settings.source_batch_records,
        settings.source_batch_mib * MIB,
        settings.source_window,
        settings.join_poll_s,
        settings.source_poll_s,
    )

    async def prepare(source: Source, others: Mapping[str, Source]) -> None:
        if isinstance(source.spec, JoinSpec):
            await asyncio.to_thread(check_join, source, others, join_store)
            await prepare_join(source, lanes)
        else:
            lanes.contract(source.contract)
            await asyncio.to_thread(connections.check, source.spec)

    def make_runner(source: Source, standing: Standing, progress: Progress) -> Runner:
        spec = source.spec
        if isinstance(spec, JoinSpec):
            return JoinSource(
                source,
                lanes=lanes,
                open_table=open_table,
                store=join_store,
                clock=clock,
                progress=progress,
                limits=joining,
                crash_point=crash_point,
            )
        if not isinstance(spec, TopicSpec):
            return FileSource(
                source,
                last=standing.last_run,
                lanes=lanes,
                store=store,
                clock=clock,
                progress=progress,
                limits=files,
            )
        parse, registry = connections.parse(spec)

        def make_reader(
            begin: Callable[[Mapping[Place, Edge]], Mapping[Place, int]], release: Callable[[Sequence[Place]], None]
        ) -> TopicReader:
            return TopicReader(
                connections.options(spec), spec.topics, spec.group, reading, begin=begin, release=release
            )

        return TopicSource(
            source,
            lanes=lanes,
            store=store,
            make_reader=make_reader,
            parse=parse,
            registry=registry,
            progress=progress,
            limits=topics,
        )

    limits = SupervisorLimits(settings.max_sources, settings.source_poll_s, settings.source_retry_max_s)
    lease = Lease(engine, uuid7(), clock, settings.source_lease_s)
    return Supervisor(store, lease, prepare=prepare, make_runner=make_runner, limits=limits)
