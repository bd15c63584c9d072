"""Wiring of the feature service; the only module that creates things."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc.aio
import uvloop
from millrace_api.feature.v1 import offline_pb2_grpc, search_pb2_grpc, transformers_pb2_grpc, versions_pb2_grpc
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from millrace_kit.bus import Bus, Subscription, TopicPartition, open_bus, records_topic
from millrace_kit.call_door import CallDoor
from millrace_kit.client import open_channel
from millrace_kit.clock import Clock, SystemClock
from millrace_kit.content import ContentStore
from millrace_kit.entry import run_service
from millrace_kit.processes import own_number
from millrace_kit.server import Service, Worker
from millrace_kit.sql import open_engine

from millrace_feature.builder import Builder
from millrace_feature.cache import CacheLimits, OnlineCache
from millrace_feature.catalog import Catalog
from millrace_feature.consistency.checker import Checker
from millrace_feature.consistency.log import ConsistencyLog
from millrace_feature.consistency.samples import Sampler
from millrace_feature.convert import RowReader
from millrace_feature.definitions import Applier
from millrace_feature.embedded import EmbeddedOnlineStore
from millrace_feature.feast_wire.grpc_edge import READ_METHODS, FeastGrpc
from millrace_feature.feast_wire.http_edge import FeastHttp
from millrace_feature.feast_wire.http_server import HttpServer
from millrace_feature.feast_wire.reads import FeastReads
from millrace_feature.feast_wire.searches import FeastSearches
from millrace_feature.following import DefinitionsFollower
from millrace_feature.lag import LagMeter
from millrace_feature.lake import Lake, Limits
from millrace_feature.offline.servicer import OfflineServicer
from millrace_feature.search.following import IndexFollower
from millrace_feature.search.service import VectorSearch
from millrace_feature.search.servicer import VectorServicer
from millrace_feature.servicer import SERVICE, FeatureServicer
from millrace_feature.serving import Serving
from millrace_feature.set_pins import SetPins
from millrace_feature.settings import FeatureSettings
from millrace_feature.store import OnlineStore
from millrace_feature.transformers.rights import Rights
from millrace_feature.transformers.service import Transformers
from millrace_feature.transformers.servicer import TransformerServicer
from millrace_feature.transformers.store import FittedStore
from millrace_feature.versioning.access import Access, Audit
from millrace_feature.versioning.history import Versions
from millrace_feature.versioning.servicer import DefinitionsServicer
from millrace_feature.worker import StreamWorker

NATIVE_READ = f"/{SERVICE}/GetOnlineFeatures"


class TopicEnds:
    """Where the records topics end, asked of the bus by a subscription of its own."""

    def __init__(self, bus: Bus, worker: StreamWorker) -> None:
        self._bus = bus
        self._worker = worker
        self._lock = asyncio.Lock()
        self._topics: list[str] = []
        self._subscription: Subscription | None = None

    async def __call__(self) -> Mapping[TopicPartition, int]:
        """Offset after the newest message per partition of the followed topics."""
        topics = [records_topic(contract) for contract in self._worker.contracts]
        if not topics:
            return {}
        async with self._lock:
            if self._subscription is None or topics != self._topics:
                await self._drop()
                self._subscription = await self._bus.subscribe(topics, group="feature-ends", at={})
                self._topics = topics
            return await self._subscription.end_offsets()

    async def _drop(self) -> None:
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await subscription.close()

    async def close(self) -> None:
        """Close the subscription."""
        await self._drop()


def open_store(settings: FeatureSettings, state: Path) -> OnlineStore:
    """The online store of `settings`."""
    if settings.online_store.kind == "redis":
        from millrace_feature.redis_store import RedisOnlineStore

        return RedisOnlineStore(settings.online_store.redis)
    return EmbeddedOnlineStore(state / "online.sqlite")


def open_cache(settings: FeatureSettings, store: OnlineStore, clock: Clock) -> OnlineCache | None:
    """What keeps answers of `store`, where the settings want it."""
    kept = settings.online_cache
    if not kept.max_staleness_ms:
        return None
    limits = CacheLimits(kept.max_staleness_ms / 1000, kept.max_entries, frozenset(kept.views))
    return OnlineCache(store, limits, clock.monotonic)


def open_ingestion(settings: FeatureSettings) -> grpc.aio.Channel | None:
    """A channel to ingestion, where the settings want training sets pinned."""
    wanted = settings.set_pins
    if not wanted.ingestion_address:
        return None
    return open_channel(wanted.ingestion_address, timeout_s=wanted.timeout_s, tls=settings.tls)


def feast_http(settings: FeatureSettings, reads: FeastReads, searches: FeastSearches) -> HttpServer:
    """The server of Feast's HTTP API."""
    edge = FeastHttp(
        reads,
        searches,
        max_concurrent=settings.max_concurrent_rpcs,
        max_body_bytes=settings.max_message_mib * 1024 * 1024,
        deadline_s=settings.default_deadline_s,
    )
    return HttpServer(edge, settings.feast.http_listen, settings, share_port=own_number() is not None)


def reads_worker(settings: FeatureSettings, servicer: FeatureServicer) -> Worker:
    """What answers online reads at `reads_listen`."""
    door = CallDoor(
        {NATIVE_READ: servicer.read},
        max_message_bytes=settings.max_message_mib << 20,
        max_concurrent=settings.max_concurrent_rpcs,
        allowed_clients=settings.allowed_clients,
        max_connection_age_s=settings.max_connection_age_s,
        quiet=True,
        default_deadline_s=settings.default_deadline_s,
    )

    async def run(stop: asyncio.Event) -> None:
        share_port = own_number() is not None
        await door.run_on_port(settings.reads_listen, stop, settings.drain_s, tls=settings.tls, share_port=share_port)

    return Worker("reads", run)


async def build(settings: FeatureSettings, *, clock: Clock | None = None) -> Service:
    """The feature service, ready to run."""
    clock = clock or SystemClock()
    state = Path(settings.state_dir)
    state.mkdir(parents=True, exist_ok=True)
    store = await asyncio.to_thread(open_store, settings, state)
    engine = open_engine(settings.database_url or f"sqlite:///{state / 'feature.sqlite'}")
    catalog = await asyncio.to_thread(Catalog, engine)
    versions = Versions(engine)
    audit = Audit(engine, clock, settings.access.audit_rows)
    access = await asyncio.to_thread(
        Access,
        engine,
        audit,
        settings.access,
        clock,
        lambda: current.registry if (current := catalog.current()) else None,
    )
    lake = Lake(settings.lake_url, Limits(settings.build_memory_mib, settings.build_threads, state / "spill"))
    bus = await open_bus(settings.bus)
    sampling = settings.consistency
    sampler = Sampler(sample_rate=sampling.sample_rate, max_queue=sampling.max_queue, clock=clock)
    consistency = ConsistencyLog(engine)
    checker = Checker(
        sampler=sampler,
        kept=consistency,
        lake=lake,
        definitions_of=lambda digest: catalog.get(digest).definitions,
        settings=sampling,
        clock=clock,
    )
    serving = Serving(
        store,
        read_behind_us=settings.read_behind_s * 1_000_000,
        head_behind_us=settings.head_behind_s * 1_000_000,
        reader_of=RowReader,
        observe=sampler.observe if sampling.sample_rate else None,
        cache=open_cache(settings, store, clock),
    )
    worker = StreamWorker(
        store=store,
        lake=lake,
        bus=bus,
        serving=serving,
        settings=settings,
        clock=clock,
        current=versions.live,
    )
    ends = TopicEnds(bus, worker)
    content = ContentStore(settings.training_sets_url)
    transformers = Transformers(
        store=FittedStore(engine), catalog=catalog, content=content, settings=settings, clock=clock
    )
    applier = Applier(
        catalog=catalog,
        lake=lake,
        worker=worker,
        pinned=transformers.pinned,
        versions=versions,
        access=access,
        audit=audit,
        settings=settings,
        clock=clock,
    )
    await applier.refresh()
    ingestion = open_ingestion(settings)
    pins = SetPins(IngestionServiceStub(ingestion) if ingestion else None, catalog, settings.set_pins, clock)
    servicer = FeatureServicer(
        applier=applier,
        builder=Builder(lake=lake, catalog=catalog, content=content, pins=pins, settings=settings, clock=clock),
        catalog=catalog,
        serving=serving,
        worker=worker,
        ends=ends,
        consistency=consistency,
        access=access,
        clock=clock,
    )
    definitions = DefinitionsServicer(applier=applier, catalog=catalog, versions=versions, audit=audit)
    offline = OfflineServicer(catalog=catalog, lake=lake, access=access, settings=settings)
    follower = DefinitionsFollower(applier=applier, versions=versions, access=access, settings=settings, clock=clock)

    indexes = IndexFollower(serving=serving, bus=bus, settings=settings.vector_search, clock=clock)
    search = VectorSearch(serving=serving, follower=indexes, settings=settings.vector_search, clock=clock)
    reads = FeastReads(serving, access, clock)
    add_servicers: list[Callable[[grpc.aio.Server], None]] = [
        servicer.add_to,
        lambda server: offline_pb2_grpc.add_OfflineServiceServicer_to_server(offline, server),
        lambda server: search_pb2_grpc.add_VectorServiceServicer_to_server(VectorServicer(search, access), server),
        lambda server: versions_pb2_grpc.add_DefinitionsServiceServicer_to_server(definitions, server),
        lambda server: transformers_pb2_grpc.add_TransformerServiceServicer_to_server(
            TransformerServicer(transformers, Rights(access, catalog)), server
        ),
    ]
    if settings.feast.grpc:
        add_servicers.append(FeastGrpc(reads).add_to)
    workers = [
        Worker("stream", worker.run),
        Worker("definitions", follower.run),
        Worker("vector-indexes", indexes.run),
        Worker("lag", LagMeter(store, worker, ends).run),
        Worker("consistency-log", checker.log_samples),
        Worker("consistency-check", checker.check_settled),
    ]
    if ingestion is not None:
        workers.append(Worker("set-pins", pins.run))
    if settings.reads_listen:
        workers.append(reads_worker(settings, servicer))
    if settings.feast.http_listen:
        edge = feast_http(settings, reads, FeastSearches(search, access))
        workers.append(Worker("feast-http", edge.run))

    async def close() -> None:
        if ingestion is not None:
            await ingestion.close()
        await ends.close()
        await bus.close()
        await store.close()
        catalog.close()

    return Service(
        "feature",
        add_servicers,
        [
            SERVICE,
            "millrace_api.feature.v1.TransformerService",
            "millrace_api.feature.v1.DefinitionsService",
            "millrace_api.feature.v1.OfflineService",
            "millrace_api.feature.v1.VectorService",
        ],
        workers,
        [close],
        lambda: worker.is_following,
        quiet_methods=frozenset({NATIVE_READ, *READ_METHODS}),
    )


def main() -> None:
    """Command `millrace-feature`."""
    run_service("feature", FeatureSettings, build, lambda settings: settings.processes, new_loop=uvloop.new_event_loop)
