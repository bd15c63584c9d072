"""The listener for the kubelet and Prometheus: two pages of Envoy's admin page, whether it lives, and nothing else."""

from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.type.matcher.v3 import string_pb2

from millrace_inference_gateway.envoy_clusters import ADMIN_CLUSTER, duration, packed

PAGES = ("/ready", "/stats/prometheus")
LIVE_PAGE = "/livez"
TIMEOUT_S = 10.0


def stats_manager() -> hcm_pb2.HttpConnectionManager:
    """GET of the pages goes to the admin page, everything else is refused."""
    routes = [
        route_components_pb2.Route(
            match=route_components_pb2.RouteMatch(
                path=page,
                headers=[
                    route_components_pb2.HeaderMatcher(
                        name=":method", string_match=string_pb2.StringMatcher(exact="GET")
                    )
                ],
            ),
            route=route_components_pb2.RouteAction(cluster=ADMIN_CLUSTER, timeout=duration(TIMEOUT_S)),
        )
        for page in PAGES
    ]
    # Not ready while it ends, but alive: no reason to start it anew.
    alive = route_components_pb2.DirectResponseAction(status=200)
    alive.body.inline_string = "ok\n"
    routes.append(
        route_components_pb2.Route(match=route_components_pb2.RouteMatch(path=LIVE_PAGE), direct_response=alive)
    )
    refusal = route_components_pb2.DirectResponseAction(status=404)
    refusal.body.inline_string = f"only GET of {', '.join((*PAGES, LIVE_PAGE))}\n"
    routes.append(
        route_components_pb2.Route(match=route_components_pb2.RouteMatch(prefix="/"), direct_response=refusal)
    )
    host = route_components_pb2.VirtualHost(name="stats", domains=["*"], routes=routes)
    return hcm_pb2.HttpConnectionManager(
        stat_prefix="stats",
        route_config=route_pb2.RouteConfiguration(name="stats", virtual_hosts=[host]),
        request_headers_timeout=duration(TIMEOUT_S),
        http_filters=[hcm_pb2.HttpFilter(name="envoy.filters.http.router", typed_config=packed(router_pb2.Router()))],
    )
