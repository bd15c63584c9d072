"""Wiring of the gateway's Python process."""

from importlib.metadata import version

import grpc.aio
from millrace_api.prediction.v1 import prediction_pb2_grpc
from millrace_kit.bus import open_bus
from millrace_kit.client import open_channel
from millrace_kit.clock import Clock, SystemClock, uuid7
from millrace_kit.entry import run_service
from millrace_kit.server import Service, Worker
from prometheus_client import REGISTRY
from tritonclient.grpc import service_pb2_grpc

from millrace_inference_gateway.access_log_receiver import AccessLogReceiver
from millrace_inference_gateway.applier import Applier
from millrace_inference_gateway.envoy_admin import EnvoyAdmin
from millrace_inference_gateway.envoy_files import envoy_files
from millrace_inference_gateway.figures import Figures
from millrace_inference_gateway.journal import Journal
from millrace_inference_gateway.ledger import Ledger
from millrace_inference_gateway.metrics import FiguresCollector
from millrace_inference_gateway.prediction_log import PredictionLog
from millrace_inference_gateway.publisher import Publisher
from millrace_inference_gateway.route_watch import RouteWatch
from millrace_inference_gateway.servicer import GatewayServicer, PredictionServicer, ServerServicer
from millrace_inference_gateway.settings import GatewaySettings
from millrace_inference_gateway.store import RouteStore
from millrace_inference_gateway.upstream import Channels, FeatureSource, ModelCaller

FEATURE_CHANNELS = 2
GRPC_SERVICES = (
    "millrace_api.prediction.v1.PredictionService",
    "millrace_api.prediction.v1.GatewayService",
    "inference.GRPCInferenceService",
)


async def build(settings: GatewaySettings, *, clock: Clock | None = None) -> Service:
    """Wire the gateway: routes in, figures and predictions out, Predict in between."""
    clock = clock or SystemClock()
    admin = EnvoyAdmin(settings.envoy_admin_listen)
    applier = Applier(settings, envoy_files(settings), admin, RouteStore(settings.folder), clock)
    rollout = open_channel(settings.rollout_address, tls=settings.tls)
    watch = RouteWatch(rollout, applier, gateway_id=settings.gateway_id, reconnect_s=settings.reconnect_s)

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
    collector = FiguresCollector(figures)
    REGISTRY.register(collector)
    receiver = AccessLogReceiver(figures, log)
    ledger = Ledger(settings.ledger, log)

    features = Channels(settings.feature_address, FEATURE_CHANNELS, settings.max_message_mib)
    models = Channels(f"unix:{settings.socket}", settings.predict_channels, settings.max_message_mib)
    predictions = PredictionServicer(
        settings=settings,
        table=lambda: applier.table,
        features=FeatureSource(features),
        models=ModelCaller(models),
        log=log,
        clock=clock,
        new_id=uuid7,
    )
    gateway = GatewayServicer(figures, log, lambda: applier.in_force, clock, uuid7())
    server = ServerServicer(lambda: applier.in_force, version("millrace-inference-gateway"))

    def add(to: grpc.aio.Server) -> None:
        prediction_pb2_grpc.add_PredictionServiceServicer_to_server(predictions, to)
        prediction_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, to)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(server, to)
        to.add_generic_rpc_handlers((receiver.handler(),))

    async def close_log() -> None:
        journal.close()
        REGISTRY.unregister(collector)

    return Service(
        name="inference-gateway",
        add_servicers=[add],
        grpc_services=GRPC_SERVICES,
        workers=[
            Worker("routes", applier.run),
            Worker("route-watch", watch.run),
            Worker("access-log", receiver.watch_stop),
            Worker("publisher", lambda stop: publisher.run(folder, stop)),
            Worker("ledger", ledger.run),
        ],
        closers=[close_log, bus.close, rollout.close, features.close, models.close],
    )


def main() -> None:
    """Run `millrace-inference-gateway`."""
    run_service("inference-gateway", GatewaySettings, build)
