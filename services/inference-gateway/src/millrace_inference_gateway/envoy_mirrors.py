"""Copies of requests to a version whose answers nobody gets.

Envoy keeps no access log of the copies it makes, so they go to a listener of its own first, which writes one and sends them on to the
version's servers: the figures of a shadow come by the same way as everybody's. Copies are never retried and never in the
prediction log; answers to copies of sampled requests are kept to be compared, and their number at once is limited by itself, so that a slow shadow fills nothing that callers need.
"""

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2
from envoy.config.core.v3 import address_pb2, base_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.type.matcher.v3 import string_pb2
from envoy.type.v3 import percent_pb2
from google.protobuf.wrappers_pb2 import UInt32Value

from millrace_inference_gateway.envoy_clusters import CONNECT_TIMEOUT_S, duration, http2_options
from millrace_inference_gateway.routes import Arm, Route, RouteTable

MIRRORS_NAME = "mirrors"
MIRROR_CLUSTER = "mirror"
MIRROR_LISTENER = "mirror"
MODEL_HEADER = "x-millrace-model"
SAMPLED_HEADER = "x-millrace-sampled"
"""Marks a call whose payload was sampled, so that the answer to its copy is kept too."""
ANSWERS_FILTER = "envoy.filters.http.lua"
"""Filter that keeps answers to copies; Lua reads a route's metadata under this name."""
MAX_COPIES_AT_ONCE = 256
"""Copies under way; more are not made, and Envoy counts them in `cluster.mirror.upstream_rq_pending_overflow`."""


def mirror_policies(
    route: Route, only: Arm | None = None
) -> list[route_components_pb2.RouteAction.RequestMirrorPolicy]:
    """What a route of the model copies; a request that goes to the shadow itself is not copied."""
    arm = mirrored(route)
    if arm is None or arm is only:
        return []
    fraction = percent_pb2.FractionalPercent(
        numerator=arm.mirror, denominator=percent_pb2.FractionalPercent.TEN_THOUSAND
    )
    policy = route_components_pb2.RouteAction.RequestMirrorPolicy(
        cluster=MIRROR_CLUSTER, runtime_fraction=base_pb2.RuntimeFractionalPercent(default_value=fraction)
    )
    policy.trace_sampled.value = False
    return [policy]


def mirrored(route: Route) -> Arm | None:
    """The arm that gets copies; None for none."""
    return next((arm for arm in route.arms if arm.mirror), None)


def mirror_configuration(table: RouteTable) -> route_pb2.RouteConfiguration:
    """Routes of the copies: each model's to its one shadow, everything else to nobody."""
    routes = []
    for route in table.routes.values():
        if (arm := mirrored(route)) is not None:
            match = route_components_pb2.RouteMatch(prefix="/")
            match.headers.append(
                route_components_pb2.HeaderMatcher(
                    name=MODEL_HEADER, string_match=string_pb2.StringMatcher(exact=route.model)
                )
            )
            by_http = route_components_pb2.RouteMatch(prefix="/v2/", headers=match.headers)
            for cluster, each in ((arm.http_cluster, by_http), (arm.cluster, match)):
                action = route_components_pb2.RouteAction(cluster=cluster, timeout=duration(route.timeout_ms / 1000))
                made = route_components_pb2.Route(name=cluster, match=each, route=action)
                if route.segment_header:
                    made.metadata.filter_metadata[ANSWERS_FILTER].update({"segment_header": route.segment_header})
                routes.append(made)
    # Copies that come after their shadow has gone.
    nobody = route_components_pb2.DirectResponseAction(status=404)
    rest = route_components_pb2.RouteMatch(prefix="/")
    routes.append(route_components_pb2.Route(name="nobody", match=rest, direct_response=nobody))
    host = route_components_pb2.VirtualHost(name="mirror", domains=["*"], routes=routes)
    return route_pb2.RouteConfiguration(name=MIRRORS_NAME, virtual_hosts=[host])


def mirror_cluster(socket: str) -> cluster_pb2.Cluster:
    """The listener that takes the copies, at its Unix socket."""
    limits = circuit_breaker_pb2.CircuitBreakers.Thresholds(
        max_requests=UInt32Value(value=MAX_COPIES_AT_ONCE), max_pending_requests=UInt32Value(value=MAX_COPIES_AT_ONCE)
    )
    place = address_pb2.Address(pipe=address_pb2.Pipe(path=socket))
    endpoint = endpoint_components_pb2.LbEndpoint(endpoint=endpoint_components_pb2.Endpoint(address=place))
    return cluster_pb2.Cluster(
        name=MIRROR_CLUSTER,
        type=cluster_pb2.Cluster.STATIC,
        connect_timeout=duration(CONNECT_TIMEOUT_S),
        circuit_breakers=circuit_breaker_pb2.CircuitBreakers(thresholds=[limits]),
        typed_extension_protocol_options=http2_options(),
        load_assignment=endpoint_pb2.ClusterLoadAssignment(
            cluster_name=MIRROR_CLUSTER,
            endpoints=[endpoint_components_pb2.LocalityLbEndpoints(lb_endpoints=[endpoint])],
        ),
    )
