"""How Envoy reaches the Python process's door for unary calls: HTTP/1.1 with trailers, so that gRPC's status comes through."""

from collections.abc import Mapping

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2
from envoy.config.core.v3 import address_pb2, protocol_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf.any_pb2 import Any
from google.protobuf.wrappers_pb2 import UInt32Value

from millrace_inference_gateway.envoy_clusters import CONNECT_TIMEOUT_S, HTTP_OPTIONS, duration, packed
from millrace_inference_gateway.settings import EnvoySettings

DOOR_CLUSTER = "gateway_door"
DOOR_PATHS = (
    "/millrace_api.prediction.v1.PredictionService/Predict",
    "/millrace_api.prediction.v1.PredictionService/PredictBatch",
)


def door_cluster(socket: str, settings: EnvoySettings) -> cluster_pb2.Cluster:
    """The door, at its Unix socket; one connection a running call."""
    limits = circuit_breaker_pb2.CircuitBreakers.Thresholds(
        max_connections=UInt32Value(value=settings.max_connections),
        max_pending_requests=UInt32Value(value=settings.max_pending_requests),
        max_requests=UInt32Value(value=settings.max_requests),
    )
    return unix_http1_cluster(DOOR_CLUSTER, socket, limits)


def unix_http1_cluster(
    name: str, socket: str, limits: circuit_breaker_pb2.CircuitBreakers.Thresholds
) -> cluster_pb2.Cluster:
    """A door of the Python process: HTTP/1.1 with trailers at a Unix socket."""
    options = http_protocol_options_pb2.HttpProtocolOptions(
        explicit_http_config=http_protocol_options_pb2.HttpProtocolOptions.ExplicitHttpConfig(
            http_protocol_options=protocol_pb2.Http1ProtocolOptions(enable_trailers=True)
        )
    )
    place = address_pb2.Address(pipe=address_pb2.Pipe(path=socket))
    endpoint = endpoint_components_pb2.LbEndpoint(endpoint=endpoint_components_pb2.Endpoint(address=place))
    return cluster_pb2.Cluster(
        name=name,
        type=cluster_pb2.Cluster.STATIC,
        connect_timeout=duration(CONNECT_TIMEOUT_S),
        circuit_breakers=circuit_breaker_pb2.CircuitBreakers(thresholds=[limits]),
        typed_extension_protocol_options={HTTP_OPTIONS: packed(options)},
        load_assignment=endpoint_pb2.ClusterLoadAssignment(
            cluster_name=name,
            endpoints=[endpoint_components_pb2.LocalityLbEndpoints(lb_endpoints=[endpoint])],
        ),
    )


def door_routes(options: Mapping[str, Any]) -> list[route_components_pb2.Route]:
    """Routes of the door's calls, with these options for their filters."""
    found = []
    for path in DOOR_PATHS:
        action = route_components_pb2.RouteAction(cluster=DOOR_CLUSTER, timeout=duration(0))
        # Nothing was done yet when a connection could not be made; anything later may have been answered.
        action.retry_policy.retry_on = "connect-failure,refused-stream,reset-before-request"
        match = route_components_pb2.RouteMatch(path=path)
        found.append(route_components_pb2.Route(name=path, match=match, route=action, typed_per_filter_config=options))
    return found


def take_http1(manager: hcm_pb2.HttpConnectionManager) -> None:
    """Have a listener speak HTTP/1.1 with trailers: Predict's model calls."""
    manager.codec_type = hcm_pb2.HttpConnectionManager.HTTP1
    manager.http_protocol_options.enable_trailers = True
