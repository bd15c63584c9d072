"""Makes the sources of one service; `app.py` calls it."""

from collections.abc import Callable, Mapping, Sequence

from millrace_kit.clock import Clock, uuid7
from sqlalchemy import Engine

from millrace_ingestion.settings import IngestionSettings
from millrace_ingestion.sources.connections import Connections
from millrace_ingestion.sources.file_source import FileLimits, FileSource
from millrace_ingestion.sources.lease import Lease
from millrace_ingestion.sources.specs import Progress, Source, Standing, TopicSpec
from millrace_ingestion.sources.store import SourceStore
from millrace_ingestion.sources.supervisor import Runner, Supervisor, SupervisorLimits
from millrace_ingestion.sources.topic_reader import Edge, Place, ReaderLimits, TopicReader
from millrace_ingestion.sources.topic_source import Lanes, TopicLimits, TopicSource

MIB = 1 << 20
# Room for a landing that opens its table, or that waits for a slow bus, when partitions come and go.
_RELEASE_S = 60.0


def make_supervisor(settings: IngestionSettings, engine: Engine, lanes: Lanes, clock: Clock) -> Supervisor:
    """The sources of `settings`, not yet running."""
    store = SourceStore(engine, clock)
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

    def check(source: Source) -> None:
        lanes.contract(source.contract)
        connections.check(source.spec)

    def make_runner(source: Source, standing: Standing, progress: Progress) -> Runner:
        spec = source.spec
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
    return Supervisor(store, lease, check=check, make_runner=make_runner, limits=limits)
