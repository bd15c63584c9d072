"""Wiring of the gateway's Python process."""

import asyncio
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import grpc.aio
import uvloop
from envoy.service.discovery.v3 import ads_pb2_grpc
from millrace_api.prediction.v1 import prediction_pb2_grpc
from millrace_kit.bus import open_bus
from millrace_kit.call_door import CallDoor
from millrace_kit.call_lines import CallLines, to_socket
from millrace_kit.client import open_channel
from millrace_kit.clock import Clock, SystemClock, uuid7
from millrace_kit.entry import run_service
from millrace_kit.server import Service, Worker
from prometheus_client import REGISTRY
from tritonclient.grpc import service_pb2_grpc

from millrace_inference_gateway.access_log_follower import AccessLogFollower
from millrace_inference_gateway.access_log_reader import AccessLogReader
from millrace_inference_gateway.activity import Activity, activity
from millrace_inference_gateway.answers import Answers
from millrace_inference_gateway.applier import Applier
from millrace_inference_gateway.concurrency_limits import ConcurrencyLimits
from millrace_inference_gateway.endpoints import EndpointSource, ListedEndpoints, SliceEndpoints
from millrace_inference_gateway.envoy_admin import EnvoyAdmin
from millrace_inference_gateway.envoy_auth import watch_auth
from millrace_inference_gateway.envoy_control import EnvoyControl
from millrace_inference_gateway.envoy_end import until_envoy_ends
from millrace_inference_gateway.envoy_files import EnvoyFiles, envoy_files
from millrace_inference_gateway.envoy_shedding import write_limits
from millrace_inference_gateway.envoy_wake import door_calls
from millrace_inference_gateway.feature_calls import open_feature_calls
from millrace_inference_gateway.feature_reads import FeatureReads
from millrace_inference_gateway.figures import Figures
from millrace_inference_gateway.journal import Journal
from millrace_inference_gateway.latency_weights import LatencyWeights
from millrace_inference_gateway.metrics import FiguresCollector, LimitsCollector, RoutesCollector
from millrace_inference_gateway.prediction_log import PredictionLog
from millrace_inference_gateway.predictor import Predictor
from millrace_inference_gateway.publisher import Publisher
from millrace_inference_gateway.request_samples import RequestSamples
from millrace_inference_gateway.result_cache import ResultCache
from millrace_inference_gateway.route_watch import RouteWatch
from millrace_inference_gateway.routes import RouteTable
from millrace_inference_gateway.servicer import GatewayServicer, PredictionServicer, ServerServicer, door_methods
from millrace_inference_gateway.settings import GatewaySettings
from millrace_inference_gateway.shadow_figures import ShadowFigures
from millrace_inference_gateway.shadow_pairs import ShadowPairs
from millrace_inference_gateway.store import RouteStore, remembered
from millrace_inference_gateway.upstream import ENVOY, ModelCaller
from millrace_inference_gateway.waker import Waker, wake_methods
from millrace_inference_gateway.zero_hop import ZeroHopServicer

if TYPE_CHECKING:
    from millrace_inference_gateway.oidc import IssuerKeys

GRPC_SERVICES = (
    "millrace_api.prediction.v1.PredictionService",
    "millrace_api.prediction.v1.GatewayService",
    "inference.GRPCInferenceService",
)


async def build(settings: GatewaySettings, *, clock: Clock | None = None) -> Service:
    """Wire the gateway: routes in, figures and predictions out, Predict in between."""
    clock = clock or SystemClock()
    admin = EnvoyAdmin(settings.envoy_admin_listen)
    store, files = RouteStore(settings.folder), envoy_files(settings)
    source, following = _endpoint_source(settings, store, clock)
    weights = LatencyWeights()
    control = EnvoyControl(files, admin, settings)
    applier = Applier(settings, control, store, source, clock, weights=weights)
    rollout = open_channel(settings.rollout_address, tls=settings.tls)
    watch = RouteWatch(
        rollout,
        applier,
        clock,
        gateway_id=settings.gateway_id,
        figures_address=settings.advertise_address,
        reconnect_s=settings.reconnect_s,
    )

    kept = settings.prediction_log
    folder = settings.folder / "journal"
    journal = Journal(folder, segment_bytes=kept.segment_bytes, max_segments=kept.max_segments)
    log = PredictionLog(journal, kept.sample_max_rows)
    bus = await open_bus(settings.bus)
    publisher = Publisher(
        journal,
        bus,
        log,
        gateway_id=settings.gateway_id,
        batch_entries=kept.batch_entries,
        interval_s=kept.publish_interval_s,
    )
    figures = Figures()
    shadows, samples = ShadowFigures(), RequestSamples()
    answers = Answers(samples, ShadowPairs(lambda: applier.table, shadows, clock.monotonic), clock.monotonic)
    limits = ConcurrencyLimits(
        settings.envoy,
        clock,
        lambda: (applier.in_force or RouteTable()).arms,
        lambda values: write_limits(files, dict(values)),
    )
    issuer = _issuer(settings, files, clock)
    reader = AccessLogReader(
        figures,
        log,
        answers,
        weights,
        limits=limits,
        models=lambda: applier.table.routes,
        unknown_key=issuer.unknown_key if issuer else lambda: None,
    )
    follower = AccessLogFollower(
        settings.access_log,
        folder / "taken.json",
        journal.position,
        take=reader.take,
        missed=log.missed,
        interval_s=kept.flush_interval_s,
    )

    async def log_predictions(stop: asyncio.Event) -> None:
        # What Envoy wrote last is published too.
        followed = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(publisher.run(folder, followed))
            try:
                await follower.run(stop)
            finally:
                followed.set()

    collectors = (
        FiguresCollector(figures),
        RoutesCollector(lambda: applier.in_force, lambda: log.counts),
        LimitsCollector(limits),
    )
    for collector in collectors:
        REGISTRY.register(collector)

    features = open_feature_calls(settings)
    max_message_bytes = settings.max_message_mib << 20
    models = CallLines(to_socket(settings.socket), ENVOY, settings.predict_channels, max_message_bytes)
    predictor = Predictor(
        settings=settings,
        table=lambda: applier.table,
        features=FeatureReads(
            features, at_once=settings.feature_reads_at_once, max_rows=settings.feature_rows_together
        ),
        models=ModelCaller(models),
        cache=ResultCache(settings.result_cache_entries),
        log=log,
        answers=answers,
        clock=clock,
        new_id=uuid7,
    )
    predictions = PredictionServicer(predictor, settings.max_stream_calls)
    door = CallDoor(
        door_methods(predictor),
        max_message_bytes=max_message_bytes,
        max_concurrent=settings.max_concurrent_rpcs,
    )
    waker = Waker(rollout, lambda: applier.in_force, control.healthy, clock, settings.wake)
    wake_door = CallDoor(wake_methods(waker), max_message_bytes=0, max_concurrent=door_calls(settings.wake))
    zero_hop = ZeroHopServicer(lambda: applier.in_force, settings.max_zero_hop_clients, waker.wake)

    async def activity_now() -> list[Activity]:
        return await activity(applier.in_force, admin.stats, waker.held, zero_hop.followers)

    gateway = GatewayServicer(
        figures,
        log,
        lambda: applier.in_force,
        clock,
        uuid7(),
        shadows=shadows,
        samples=samples,
        activity=activity_now,
    )
    server = ServerServicer(lambda: applier.in_force, version("millrace-inference-gateway"))

    def add(to: grpc.aio.Server) -> None:
        # Where Envoy comes in: beside `listen`, which may have TLS and is for the rollout controller.
        to.add_insecure_port(f"unix:{settings.python_socket}")
        prediction_pb2_grpc.add_PredictionServiceServicer_to_server(predictions, to)
        prediction_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, to)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(server, to)
        if settings.max_zero_hop_clients:
            ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(zero_hop, to)

    async def close_log() -> None:
        waker.close()
        journal.close()
        for collector in collectors:
            REGISTRY.unregister(collector)

    return Service(
        name="inference-gateway",
        add_servicers=[add],
        grpc_services=GRPC_SERVICES,
        workers=[
            *following,
            *([Worker("issuer", issuer.run)] if issuer else ()),
            Worker("auth", lambda stop: watch_auth(files, settings.auth, stop)),
            Worker("routes", applier.run),
            Worker("route-watch", watch.run),
            Worker("latency-weights", weights.run),
            Worker("concurrency-limits", limits.run),
            Worker("prediction-log", log_predictions),
            Worker("door", lambda stop: door.run(settings.door_socket, stop, settings.drain_s)),
            Worker("wake-door", lambda stop: wake_door.run(settings.wake_socket, stop, settings.drain_s)),
        ],
        closers=[close_log, bus.close, rollout.close, features.close, models.close],
        ready=watch.ready,
        linger=lambda: until_envoy_ends(admin, settings),
    )


def _issuer(settings: GatewaySettings, files: EnvoyFiles, clock: Clock) -> "IssuerKeys | None":
    """Who finds the keys of tokens, where an issuer is to be asked."""
    if settings.auth.jwt is None or settings.auth.jwt.oidc is None:
        return None
    from millrace_inference_gateway.oidc import IssuerKeys

    return IssuerKeys(settings.auth.jwt, files, clock)


def _endpoint_source(
    settings: GatewaySettings, store: RouteStore, clock: Clock
) -> tuple[EndpointSource, Sequence[Worker]]:
    """Where servers come from, and what has to run for it."""
    if settings.kubernetes is None:
        return ListedEndpoints(), ()
    # An HTTP client that a gateway of one machine has no use for.
    from millrace_inference_gateway.slice_watch import SliceWatch

    own_pod = settings.gateway_id if settings.kubernetes.prefer_own_zone else ""
    slices = SliceEndpoints(settings.kubernetes.namespace, remembered(store.load().table), own_pod=own_pod)
    return slices, [Worker("endpoint-slices", SliceWatch(settings.kubernetes, slices, clock).run)]


def main() -> None:
    """Run `millrace-inference-gateway`."""
    run_service("inference-gateway", GatewaySettings, build, new_loop=uvloop.new_event_loop)
