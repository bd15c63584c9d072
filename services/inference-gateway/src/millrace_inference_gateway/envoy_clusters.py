"""Clusters and endpoints for Envoy, as typed messages: one cluster an arm, plus those every gateway has."""

from collections.abc import Iterable
from importlib import resources

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2, outlier_detection_pb2
from envoy.config.core.v3 import (
    address_pb2,
    base_pb2,
    config_source_pb2,
    health_check_pb2,
    protocol_pb2,
)
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.extensions.clusters.aggregate.v3 import cluster_pb2 as aggregate_pb2
from envoy.extensions.filters.http.lua.v3 import lua_pb2
from envoy.extensions.filters.http.upstream_codec.v3 import upstream_codec_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from envoy.type.v3 import percent_pb2
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import BoolValue, UInt32Value

from millrace_inference_gateway.routes import Arm, Endpoint, Route, RouteTable
from millrace_inference_gateway.settings import EnvoySettings

PYTHON_CLUSTER = "gateway_python"
CHECKED_PYTHON_CLUSTER = "gateway_python_checked"
SERVER_CLUSTER = "v2_server"
ADMIN_CLUSTER = "envoy_admin"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
CONNECT_TIMEOUT_S = 1.0
MIN_RETRIES_AT_ONCE = 10
# A server that joins begins with this share of what it shall get.
SLOW_START_MIN_PERCENT = 10
# Prime; at most one part in a hundred of it falls to a wrong server for up to 600 servers.
MAGLEV_TABLE = 65_537
# Envoy has two classes of calls, each with limits of its own; the one it calls high carries the calls of low priority here, so that
# its default stays what it is for everybody else.
LOW_PRIORITY = base_pb2.HIGH
HTTP_READY = "/v2/health/ready"


def packed(message: Message) -> Any:
    """`message` inside an `Any`."""
    found = Any()
    found.Pack(message)
    return found


def duration(seconds: float) -> Duration:
    """`seconds` as a protobuf duration."""
    found = Duration()
    found.FromNanoseconds(round(seconds * 1e9))
    return found


def address(host: str, port: int) -> address_pb2.Address:
    """A TCP address."""
    return address_pb2.Address(socket_address=address_pb2.SocketAddress(address=host, port_value=port))


def file_source(path: str) -> config_source_pb2.ConfigSource:
    """Configuration that Envoy reads from `path` again whenever the file is replaced."""
    return config_source_pb2.ConfigSource(
        path_config_source=config_source_pb2.PathConfigSource(path=path),
        resource_api_version=config_source_pb2.ApiVersion.V3,
    )


def load_assignment(cluster: str, endpoints: Iterable[Endpoint]) -> endpoint_pb2.ClusterLoadAssignment:
    """The servers of `cluster`; those of other zones get what the near ones cannot take, because too few of them are healthy."""
    groups: tuple[list[Endpoint], list[Endpoint]] = ([], [])
    for endpoint in endpoints:
        groups[endpoint.far].append(endpoint)
    assignment = endpoint_pb2.ClusterLoadAssignment(cluster_name=cluster)
    for priority, members in enumerate(groups):
        if members or not priority:
            assignment.endpoints.append(_locality(members, priority))
    return assignment


def _locality(members: Iterable[Endpoint], priority: int) -> endpoint_components_pb2.LocalityLbEndpoints:
    return endpoint_components_pb2.LocalityLbEndpoints(
        priority=priority,
        lb_endpoints=[
            endpoint_components_pb2.LbEndpoint(
                endpoint=endpoint_components_pb2.Endpoint(address=address(endpoint.host, endpoint.port)),
                load_balancing_weight=UInt32Value(value=endpoint.weight),
            )
            for endpoint in members
        ],
    )


def http1_options() -> dict[str, Any]:
    """Cluster options: HTTP/1.1, what model servers speak at their HTTP port."""
    explicit = http_protocol_options_pb2.HttpProtocolOptions.ExplicitHttpConfig(
        http_protocol_options=protocol_pb2.Http1ProtocolOptions()
    )
    return {HTTP_OPTIONS: packed(http_protocol_options_pb2.HttpProtocolOptions(explicit_http_config=explicit))}


def http2_options() -> dict[str, Any]:
    """Cluster options: HTTP/2."""
    options = http_protocol_options_pb2.HttpProtocolOptions(
        explicit_http_config=http_protocol_options_pb2.HttpProtocolOptions.ExplicitHttpConfig(
            http2_protocol_options=protocol_pb2.Http2ProtocolOptions(
                # Large enough that a tensor of many MiB is not slowed by window updates.
                initial_stream_window_size=UInt32Value(value=4 << 20),
                initial_connection_window_size=UInt32Value(value=16 << 20),
            )
        )
    )
    return {HTTP_OPTIONS: packed(options)}


def _health_check(settings: EnvoySettings) -> health_check_pb2.HealthCheck:
    return health_check_pb2.HealthCheck(
        timeout=duration(settings.health_timeout_s),
        interval=duration(settings.health_interval_s),
        no_traffic_interval=duration(settings.health_interval_s),
        unhealthy_interval=duration(settings.health_interval_s),
        unhealthy_threshold=UInt32Value(value=settings.unhealthy_after),
        healthy_threshold=UInt32Value(value=1),
        grpc_health_check=health_check_pb2.HealthCheck.GrpcHealthCheck(),
    )


def _thresholds(settings: EnvoySettings, percent: float) -> circuit_breaker_pb2.CircuitBreakers.Thresholds:
    """Limits of one class of calls, as a share of those of normal calls."""
    return circuit_breaker_pb2.CircuitBreakers.Thresholds(
        max_connections=UInt32Value(value=settings.max_connections),
        max_pending_requests=UInt32Value(value=max(1, round(settings.max_pending_requests * percent / 100))),
        max_requests=UInt32Value(value=max(1, round(settings.max_requests * percent / 100))),
        retry_budget=circuit_breaker_pb2.CircuitBreakers.Thresholds.RetryBudget(
            budget_percent=percent_pb2.Percent(value=settings.retry_budget_percent),
            min_retry_concurrency=UInt32Value(value=MIN_RETRIES_AT_ONCE),
        ),
    )


def _common(name: str, settings: EnvoySettings) -> cluster_pb2.Cluster:
    """What all clusters share: HTTP/2, limits, no panic routing to servers known to be dead."""
    normal, low = _thresholds(settings, 100.0), _thresholds(settings, settings.low_priority_percent)
    low.priority = LOW_PRIORITY
    cluster = cluster_pb2.Cluster(
        name=name,
        connect_timeout=duration(CONNECT_TIMEOUT_S),
        circuit_breakers=circuit_breaker_pb2.CircuitBreakers(thresholds=[normal, low]),
        typed_extension_protocol_options=http2_options(),
        ignore_health_on_host_removal=True,
    )
    cluster.common_lb_config.healthy_panic_threshold.CopyFrom(percent_pb2.Percent(value=0))
    return cluster


def http_endpoints(arm: Arm) -> tuple[Endpoint, ...]:
    """The HTTP side of the arm's servers."""
    return tuple(endpoint.http for endpoint in arm.endpoints)


def http_arm_cluster(arm: Arm, route: Route, settings: EnvoySettings, endpoints_file: str) -> cluster_pb2.Cluster:
    """The same servers as `arm_cluster`'s, at their HTTP port."""
    cluster = arm_cluster(arm, route, settings, endpoints_file)
    cluster.name = arm.http_cluster
    cluster.ClearField("typed_extension_protocol_options")
    for name, options in http1_options().items():
        cluster.typed_extension_protocol_options[name].CopyFrom(options)
    (check,) = cluster.health_checks
    check.http_health_check.path = HTTP_READY
    if cluster.HasField("load_assignment"):
        cluster.load_assignment.CopyFrom(load_assignment(arm.http_cluster, http_endpoints(arm)))
    _say_version(cluster, arm)
    return cluster


def arm_cluster(arm: Arm, route: Route, settings: EnvoySettings, endpoints_file: str) -> cluster_pb2.Cluster:
    """The servers of one version: balanced, health-checked, ejected when they lose calls."""
    cluster = _common(arm.cluster, settings)
    _balance(cluster, route, settings)
    cluster.health_checks.append(_health_check(settings))
    # Errors that a model answers are its version's fault, the same on every server; only servers that lose or refuse calls go.
    cluster.outlier_detection.CopyFrom(
        outlier_detection_pb2.OutlierDetection(
            split_external_local_origin_errors=True,
            consecutive_local_origin_failure=UInt32Value(value=3),
            enforcing_consecutive_local_origin_failure=UInt32Value(value=100),
            enforcing_local_origin_success_rate=UInt32Value(value=0),
            enforcing_consecutive_5xx=UInt32Value(value=0),
            enforcing_consecutive_gateway_failure=UInt32Value(value=0),
            enforcing_success_rate=UInt32Value(value=0),
            base_ejection_time=duration(settings.ejection_s),
            interval=duration(min(settings.ejection_s, 1.0)),
            max_ejection_percent=UInt32Value(value=50),
            successful_active_health_check_uneject_host=BoolValue(value=True),
        )
    )
    # By default Envoy's workers learn up to a second later than its admin page that a server is healthy.
    cluster.common_lb_config.update_merge_window.CopyFrom(duration(0))
    if all(endpoint.is_ip for endpoint in arm.endpoints):
        cluster.type = cluster_pb2.Cluster.EDS
        cluster.eds_cluster_config.CopyFrom(
            cluster_pb2.Cluster.EdsClusterConfig(eds_config=file_source(endpoints_file))
        )
    else:
        cluster.type = cluster_pb2.Cluster.STRICT_DNS
        cluster.load_assignment.CopyFrom(load_assignment(arm.cluster, arm.endpoints))
    _say_version(cluster, arm)
    return cluster


def _say_version(cluster: cluster_pb2.Cluster, arm: Arm) -> None:
    """Have calls name the version where its servers hold others too; only behind the split it is known which one is meant."""
    if not arm.server_version:
        return
    script = resources.files(__package__).joinpath("server_version.lua").read_text(encoding="utf-8")
    source = base_pb2.DataSource(inline_string=script.format(number=arm.server_version))
    options = http_protocol_options_pb2.HttpProtocolOptions()
    cluster.typed_extension_protocol_options[HTTP_OPTIONS].Unpack(options)
    options.http_filters.extend(
        [
            hcm_pb2.HttpFilter(name="millrace.version", typed_config=packed(lua_pb2.Lua(default_source_code=source))),
            hcm_pb2.HttpFilter(name="codec", typed_config=packed(upstream_codec_pb2.UpstreamCodec())),
        ]
    )
    cluster.typed_extension_protocol_options[HTTP_OPTIONS].CopyFrom(packed(options))


def _balance(cluster: cluster_pb2.Cluster, route: Route, settings: EnvoySettings) -> None:
    slow_start = cluster_pb2.Cluster.SlowStartConfig(
        slow_start_window=duration(settings.slow_start_s),
        min_weight_percent=percent_pb2.Percent(value=SLOW_START_MIN_PERCENT),
    )
    match route.balancing:
        case "round_robin":
            cluster.lb_policy = cluster_pb2.Cluster.ROUND_ROBIN
            if settings.slow_start_s:
                cluster.round_robin_lb_config.slow_start_config.CopyFrom(slow_start)
        case "consistent_hash":
            cluster.lb_policy = cluster_pb2.Cluster.MAGLEV
            cluster.maglev_lb_config.table_size.value = MAGLEV_TABLE
        case "least_request" | "response_time":
            # With the weights of measured latency, the fewest requests for its weight.
            cluster.lb_policy = cluster_pb2.Cluster.LEAST_REQUEST
            if settings.slow_start_s:
                cluster.least_request_lb_config.slow_start_config.CopyFrom(slow_start)


def server_cluster(table: RouteTable) -> cluster_pb2.Cluster:
    """Who answers for the server as a whole (ServerLive, ServerMetadata, …): the Python process, and when it is down any model
    server.
    """
    members = [CHECKED_PYTHON_CLUSTER, *sorted(table.arms)]
    return cluster_pb2.Cluster(
        name=SERVER_CLUSTER,
        connect_timeout=duration(CONNECT_TIMEOUT_S),
        lb_policy=cluster_pb2.Cluster.CLUSTER_PROVIDED,
        cluster_type=cluster_pb2.Cluster.CustomClusterType(
            name="envoy.clusters.aggregate", typed_config=packed(aggregate_pb2.ClusterConfig(clusters=members))
        ),
    )


def table_clusters(
    table: RouteTable, settings: EnvoySettings, endpoints_files: dict[str, str]
) -> list[cluster_pb2.Cluster]:
    """Every cluster that comes and goes with the routes; `endpoints_files` is by cluster name."""
    found = []
    for route in table.routes.values():
        for arm in route.arms:
            found.append(arm_cluster(arm, route, settings, endpoints_files[arm.cluster]))
            found.append(http_arm_cluster(arm, route, settings, endpoints_files[arm.http_cluster]))
    return [*found, server_cluster(table)]


def own_clusters(socket: str, settings: EnvoySettings) -> list[cluster_pb2.Cluster]:
    """The Python process, at its Unix socket, twice: for calls that only it can take, never given up, so that it serves as soon as it
    listens; and health-checked, for those somebody else can take over.
    """
    plain = _common(PYTHON_CLUSTER, settings)
    checked = _common(CHECKED_PYTHON_CLUSTER, settings)
    for cluster in (plain, checked):
        _static(cluster, address_pb2.Address(pipe=address_pb2.Pipe(path=socket)))
    checked.health_checks.append(_health_check(settings))
    return [plain, checked]


def admin_cluster(host: str, port: int) -> cluster_pb2.Cluster:
    """Envoy's own admin page (HTTP/1), for the few pages of it that others may see."""
    cluster = cluster_pb2.Cluster(name=ADMIN_CLUSTER, connect_timeout=duration(CONNECT_TIMEOUT_S))
    _static(cluster, address(host, port))
    return cluster


def _static(cluster: cluster_pb2.Cluster, place: address_pb2.Address) -> None:
    cluster.type = cluster_pb2.Cluster.STATIC
    endpoint = endpoint_components_pb2.LbEndpoint(endpoint=endpoint_components_pb2.Endpoint(address=place))
    locality = endpoint_components_pb2.LocalityLbEndpoints(lb_endpoints=[endpoint])
    cluster.load_assignment.CopyFrom(
        endpoint_pb2.ClusterLoadAssignment(cluster_name=cluster.name, endpoints=[locality])
    )
