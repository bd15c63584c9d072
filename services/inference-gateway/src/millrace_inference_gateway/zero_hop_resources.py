"""Routes as resources for gRPC clients that follow the gateway's xDS and call model servers themselves.

gRPC's clients know less than Envoy: no CEL, no callers' rights, no split by hash. So a split is said twice: by ranges of a number that a
sticky client computes (`x-millrace-unit`, the same that Envoy computes from the sticky header), and by weights for everybody else. A model with
rules or with rights is not offered.
"""

from collections.abc import Iterable

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import base_pb2, config_source_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.config.listener.v3 import api_listener_pb2, listener_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.type.v3 import range_pb2
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import UInt32Value

from millrace_inference_gateway.envoy_clusters import address, duration, packed
from millrace_inference_gateway.routes import Arm, Route, RouteTable

UNIT_HEADER = "x-millrace-unit"
LISTENER, ROUTES, CLUSTER, ENDPOINTS = (
    f"type.googleapis.com/envoy.config.{name}"
    for name in (
        "listener.v3.Listener",
        "route.v3.RouteConfiguration",
        "cluster.v3.Cluster",
        "endpoint.v3.ClusterLoadAssignment",
    )
)


def offered(route: Route) -> bool:
    """Whether clients may go around the proxy: nothing about the model is decided there except by weight."""
    by_address = all(endpoint.is_ip for arm in route.arms for endpoint in arm.endpoints)
    # In servers of several versions a call has to name its own, which the proxy does.
    alone = all(not arm.server_version for arm in route.arms)
    return by_address and alone and not route.rules and not route.callers


def resources(table: RouteTable, kind: str, names: Iterable[str]) -> dict[str, Message]:
    """The resources of one type that exist, by name; model names for listeners and routes, cluster names for the others."""
    models = {model: route for model, route in table.routes.items() if offered(route)}
    found: dict[str, Message] = {}
    for name in sorted(names):
        model = name.split("/")[1] if name.count("/") == 2 else name
        route = models.get(model)
        arm = table.arms.get(name) if route is not None else None
        if route is not None and kind == LISTENER and name == model:
            found[name] = _listener(name)
        elif route is not None and kind == ROUTES and name == model:
            found[name] = _routes(route)
        elif arm is not None and kind == CLUSTER:
            found[name] = _cluster(arm)
        elif arm is not None and kind == ENDPOINTS:
            found[name] = _endpoints(arm)
    return found


def _ads() -> config_source_pb2.ConfigSource:
    return config_source_pb2.ConfigSource(
        ads=config_source_pb2.AggregatedConfigSource(), resource_api_version=config_source_pb2.ApiVersion.V3
    )


def _listener(model: str) -> listener_pb2.Listener:
    manager = hcm_pb2.HttpConnectionManager(
        rds=hcm_pb2.Rds(route_config_name=model, config_source=_ads()),
        http_filters=[hcm_pb2.HttpFilter(name="router", typed_config=packed(router_pb2.Router()))],
    )
    return listener_pb2.Listener(name=model, api_listener=api_listener_pb2.ApiListener(api_listener=packed(manager)))


def _routes(route: Route) -> route_pb2.RouteConfiguration:
    weighted = [arm for arm in route.arms if arm.weight]
    limit = route_components_pb2.RouteAction.MaxStreamDuration(max_stream_duration=duration(route.timeout_ms / 1000))
    found = []
    start = 0
    for arm in weighted if len(weighted) > 1 else ():
        match = route_components_pb2.RouteMatch(prefix="")
        units = range_pb2.Int64Range(start=start, end=start + arm.weight)
        match.headers.append(route_components_pb2.HeaderMatcher(name=UNIT_HEADER, range_match=units))
        action = route_components_pb2.RouteAction(cluster=arm.cluster, max_stream_duration=limit)
        found.append(route_components_pb2.Route(match=match, route=action))
        start += arm.weight
    split = route_components_pb2.WeightedCluster(
        clusters=[
            route_components_pb2.WeightedCluster.ClusterWeight(name=arm.cluster, weight=UInt32Value(value=arm.weight))
            for arm in weighted
        ]
    )
    action = route_components_pb2.RouteAction(weighted_clusters=split, max_stream_duration=limit)
    found.append(route_components_pb2.Route(match=route_components_pb2.RouteMatch(prefix=""), route=action))
    host = route_components_pb2.VirtualHost(name=route.model, domains=["*"], routes=found)
    return route_pb2.RouteConfiguration(name=route.model, virtual_hosts=[host])


def _cluster(arm: Arm) -> cluster_pb2.Cluster:
    return cluster_pb2.Cluster(
        name=arm.cluster,
        type=cluster_pb2.Cluster.EDS,
        eds_cluster_config=cluster_pb2.Cluster.EdsClusterConfig(eds_config=_ads()),
        lb_policy=cluster_pb2.Cluster.ROUND_ROBIN,
    )


def _endpoints(arm: Arm) -> endpoint_pb2.ClusterLoadAssignment:
    locality = endpoint_components_pb2.LocalityLbEndpoints(
        # gRPC takes no locality without a name and a weight.
        locality=base_pb2.Locality(region="millrace"),
        load_balancing_weight=UInt32Value(value=1),
        lb_endpoints=[
            endpoint_components_pb2.LbEndpoint(
                endpoint=endpoint_components_pb2.Endpoint(address=address(endpoint.host, endpoint.port))
            )
            for endpoint in arm.endpoints
        ],
    )
    return endpoint_pb2.ClusterLoadAssignment(cluster_name=arm.cluster, endpoints=[locality])
