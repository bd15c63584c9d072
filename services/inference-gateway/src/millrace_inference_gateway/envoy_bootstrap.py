"""What Envoy starts with: its listeners, the admin page, and where the changing parts are read from.

The public listener takes clients; it gives every request a new id. The inner one, a Unix socket only this machine's user can
reach, takes Predict's model calls and keeps the id that Predict chose. Both use the same routes. A third one, where the settings ask
for it, shows health and statistics.
"""

from http import HTTPStatus
from importlib import resources

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.config.common.mutation_rules.v3 import mutation_rules_pb2
from envoy.config.core.v3 import address_pb2, base_pb2, extension_pb2, protocol_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.access_loggers.file.v3 import file_pb2
from envoy.extensions.filters.http.grpc_json_transcoder.v3 import transcoder_pb2
from envoy.extensions.filters.http.grpc_web.v3 import grpc_web_pb2
from envoy.extensions.filters.http.lua.v3 import lua_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.http.early_header_mutation.header_mutation.v3 import header_mutation_pb2
from envoy.extensions.request_id.uuid.v3 import uuid_pb2
from envoy.type.matcher.v3 import regex_pb2
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import BoolValue, UInt32Value

from millrace_inference_gateway import caller_key
from millrace_inference_gateway.access_log import line_format
from millrace_inference_gateway.attribute_rules import OUTCOMES_HEADER
from millrace_inference_gateway.envoy_access import CLIENT_HEADER, GROUPS_HEADER, access_filter
from millrace_inference_gateway.envoy_actions import LUA_FILTER, header
from millrace_inference_gateway.envoy_auth import auth_filters
from millrace_inference_gateway.envoy_clusters import (
    address,
    admin_cluster,
    duration,
    file_source,
    own_clusters,
    packed,
)
from millrace_inference_gateway.envoy_door import door_cluster, take_http1
from millrace_inference_gateway.envoy_files import EnvoyFiles
from millrace_inference_gateway.envoy_mirrors import (
    ANSWERS_FILTER,
    MIRROR_LISTENER,
    MIRRORS_NAME,
    MODEL_HEADER,
    SAMPLED_HEADER,
    mirror_cluster,
)
from millrace_inference_gateway.envoy_routes import ROUTES_NAME
from millrace_inference_gateway.envoy_shedding import add_limits, shedding_answers
from millrace_inference_gateway.envoy_stats import stats_manager
from millrace_inference_gateway.envoy_supervisor import CURRENT
from millrace_inference_gateway.envoy_tls import transport_socket
from millrace_inference_gateway.envoy_wake import wake_cluster, wake_filter
from millrace_inference_gateway.openapi import PREDICTION_SERVICE, transcoding_descriptors
from millrace_inference_gateway.settings import GatewaySettings, split_address

PUBLIC, INNER = "v2", "predict"
GRPC_INFERENCE = r"/inference\.GRPCInferenceService/(ModelInfer|ModelStreamInfer)"
HTTP_INFERENCE = r"/v2/models/[^/?]+(/versions/[^/?]+)?/(infer|generate|generate_stream)(\?.*)?"
CONNECTION_BUFFER_BYTES = 1 << 20
# Of a compiled regular expression; a path with a long model name has more than Envoy's default of 100.
MAX_REGEX_SIZE = 1000


def bootstrap(settings: GatewaySettings, files: EnvoyFiles) -> bootstrap_pb2.Bootstrap:
    """Envoy's bootstrap."""
    admin_host, admin_port = split_address(settings.envoy_admin_listen, "envoy_admin_listen")
    message = bootstrap_pb2.Bootstrap()
    message.node.id = message.node.cluster = settings.gateway_id
    message.admin.address.CopyFrom(address(admin_host, admin_port))
    layer = message.layered_runtime.layers.add(name="limits")
    layer.static_layer.update({"re2.max_program_size.error_level": MAX_REGEX_SIZE})
    add_limits(message, settings.envoy, files)
    message.dynamic_resources.cds_config.CopyFrom(file_source(str(files.clusters)))
    message.static_resources.clusters.extend(own_clusters(str(settings.python_socket), settings.envoy))
    message.static_resources.clusters.append(door_cluster(str(settings.door_socket), settings.envoy))
    message.static_resources.clusters.append(wake_cluster(str(settings.wake_socket), settings.wake))
    message.static_resources.listeners.extend([_public(settings, files), _inner(settings, files)])
    message.static_resources.listeners.append(_mirror(settings, files))
    message.static_resources.clusters.append(mirror_cluster(str(settings.mirror_socket)))
    if settings.stats_listen:
        message.static_resources.clusters.append(admin_cluster(admin_host, admin_port))
        place = address(*split_address(settings.stats_listen, "stats_listen"))
        stats = _listener("stats", place, stats_manager())
        # Whoever looks after the gateway has to see it when it is full.
        stats.bypass_overload_manager = True
        stats.ignore_global_conn_limit = True
        message.static_resources.listeners.append(stats)
    return message


def _public(settings: GatewaySettings, files: EnvoyFiles) -> listener_pb2.Listener:
    host, port = split_address(settings.public_listen, "public_listen")
    manager = _manager(PUBLIC, settings, files)
    manager.http_filters.insert(0, wake_filter(settings.wake))
    # HTTP/1.1 too, for REST and for V2 over HTTP.
    manager.codec_type = hcm_pb2.HttpConnectionManager.AUTO
    manager.early_header_mutation_extensions.append(
        _extension(
            "envoy.http.early_header_mutation.header_mutation",
            header_mutation_pb2.HeaderMutation(mutations=_own_headers(settings)),
        )
    )
    script = resources.files(__package__).joinpath("model_name.lua").read_text(encoding="utf-8")
    log = settings.prediction_log
    inflate = resources.files(__package__).joinpath("inflate.lua").read_text(encoding="utf-8")
    source = inflate + script.format(
        sample_ratio=log.sample_ratio,
        samples_per_s=log.samples_per_s,
        sample_max_bytes=log.sample_max_bytes,
        model_header=MODEL_HEADER,
        sampled_header=SAMPLED_HEADER,
        sticky_header=caller_key.HEADER,
        sticky_member=caller_key.MEMBER.replace(".", "%."),
        max_key=caller_key.MAX_KEY,
    )
    lua = lua_pb2.Lua(default_source_code=base_pb2.DataSource(inline_string=source))
    manager.http_filters.insert(0, access_filter())
    manager.http_filters.insert(0, hcm_pb2.HttpFilter(name=LUA_FILTER, typed_config=packed(lua)))
    for number, each in enumerate([*_translators(), *auth_filters(files, settings.auth)]):
        manager.http_filters.insert(number, each)
    if settings.envoy.connection_age_s:
        manager.common_http_protocol_options.max_connection_duration.CopyFrom(duration(settings.envoy.connection_age_s))
    listener = _listener("public", address(host, port), manager)
    # Only this one is emptied at the end; what Predict, the kubelet and Prometheus use stays to the last.
    listener.traffic_direction = base_pb2.TrafficDirection.INBOUND
    listener.drain_type = listener_pb2.Listener.DEFAULT
    if (socket := transport_socket(files, settings.public_tls)) is not None:
        listener.filter_chains[0].transport_socket.CopyFrom(socket)
    return listener


def _own_headers(settings: GatewaySettings) -> list[mutation_rules_pb2.HeaderMutation]:
    """What clients may not say themselves: an id of a prediction (two calls may carry the same one), who they are, what rules found."""
    dropped = ("x-request-id", CLIENT_HEADER, GROUPS_HEADER, OUTCOMES_HEADER)
    found = [mutation_rules_pb2.HeaderMutation(remove=name) for name in dropped]
    if settings.public_tls.mode == "mutual":
        # A certificate without such a name says nothing, and the one before stays.
        names = ("%DOWNSTREAM_PEER_URI_SAN%", "%DOWNSTREAM_PEER_DNS_SAN%")
        found += [mutation_rules_pb2.HeaderMutation(append=header(CLIENT_HEADER, name)) for name in names]
    return found


def _translators() -> list[hcm_pb2.HttpFilter]:
    """gRPC-Web and JSON into gRPC, before anybody looks at a call."""
    transcoder = transcoder_pb2.GrpcJsonTranscoder(
        proto_descriptor_bin=transcoding_descriptors(), services=[PREDICTION_SERVICE], convert_grpc_status=True
    )
    transcoder.print_options.preserve_proto_field_names = True
    transcoder.print_options.always_print_primitive_fields = True
    return [
        hcm_pb2.HttpFilter(name="envoy.filters.http.grpc_web", typed_config=packed(grpc_web_pb2.GrpcWeb())),
        hcm_pb2.HttpFilter(name="envoy.filters.http.grpc_json_transcoder", typed_config=packed(transcoder)),
    ]


def _inner(settings: GatewaySettings, files: EnvoyFiles) -> listener_pb2.Listener:
    manager = _manager(INNER, settings, files)
    manager.http_filters.insert(0, wake_filter(settings.wake))
    # Predict passes on who called; what that caller may is asked here.
    manager.http_filters.insert(0, access_filter())
    take_http1(manager)
    manager.preserve_external_request_id = True
    place = address_pb2.Address(pipe=address_pb2.Pipe(path=str(settings.socket), mode=0o600))
    return _inside(_listener("inner", place, manager))


def _mirror(settings: GatewaySettings, files: EnvoyFiles) -> listener_pb2.Listener:
    """Where Envoy's own copies of requests pass, so that they are counted."""
    manager = _manager(MIRROR_LISTENER, settings, files)
    manager.preserve_external_request_id = True
    manager.rds.CopyFrom(hcm_pb2.Rds(route_config_name=MIRRORS_NAME, config_source=file_source(str(files.mirrors))))
    if settings.prediction_log.samples_payloads:
        log = settings.prediction_log
        script = resources.files(__package__).joinpath("mirror_answers.lua").read_text(encoding="utf-8")
        source = script.format(
            samples_per_s=log.samples_per_s, sample_max_bytes=log.sample_max_bytes, sampled_header=SAMPLED_HEADER
        )
        lua = lua_pb2.Lua(default_source_code=base_pb2.DataSource(inline_string=source))
        manager.http_filters.insert(0, hcm_pb2.HttpFilter(name=ANSWERS_FILTER, typed_config=packed(lua)))
    place = address_pb2.Address(pipe=address_pb2.Pipe(path=str(settings.mirror_socket), mode=0o600))
    return _inside(_listener("mirror", place, manager))


def _inside(listener: listener_pb2.Listener) -> listener_pb2.Listener:
    """A listener of this pod's own: what comes there was let in already, and is no client's connection."""
    listener.ignore_global_conn_limit = True
    return listener


def _listener(name: str, place: address_pb2.Address, manager: hcm_pb2.HttpConnectionManager) -> listener_pb2.Listener:
    network = listener_components_pb2.Filter(
        name="envoy.filters.network.http_connection_manager", typed_config=packed(manager)
    )
    return listener_pb2.Listener(
        name=name,
        address=place,
        drain_type=listener_pb2.Listener.MODIFY_ONLY,
        per_connection_buffer_limit_bytes=UInt32Value(value=CONNECTION_BUFFER_BYTES),
        filter_chains=[listener_components_pb2.FilterChain(filters=[network])],
    )


def _extension(name: str, message: Message) -> extension_pb2.TypedExtensionConfig:
    return extension_pb2.TypedExtensionConfig(name=name, typed_config=packed(message))


def _manager(name: str, settings: GatewaySettings, files: EnvoyFiles) -> hcm_pb2.HttpConnectionManager:
    return hcm_pb2.HttpConnectionManager(
        stat_prefix=name,
        codec_type=hcm_pb2.HttpConnectionManager.HTTP2,
        rds=hcm_pb2.Rds(route_config_name=ROUTES_NAME, config_source=file_source(str(files.routes))),
        generate_request_id=BoolValue(value=True),
        request_id_extension=hcm_pb2.RequestIDExtension(
            typed_config=packed(uuid_pb2.UuidRequestIdConfig(pack_trace_reason=BoolValue(value=False)))
        ),
        drain_timeout=duration(settings.envoy.goaway_s),
        stream_idle_timeout=duration(settings.envoy.stream_idle_s),
        request_headers_timeout=duration(10),
        http2_protocol_options=protocol_pb2.Http2ProtocolOptions(
            max_concurrent_streams=UInt32Value(value=1024),
            initial_stream_window_size=UInt32Value(value=4 << 20),
            initial_connection_window_size=UInt32Value(value=16 << 20),
        ),
        http_filters=[
            hcm_pb2.HttpFilter(
                name="envoy.filters.http.router",
                typed_config=packed(router_pb2.Router(suppress_envoy_headers=True)),
            )
        ],
        access_log=_access_logs(name, settings),
        local_reply_config=shedding_answers(settings.envoy),
    )


def _access_logs(name: str, settings: GatewaySettings) -> list[accesslog_pb2.AccessLog]:
    """Every finished inference call, and every call that was turned away, as a line in a file."""
    file = file_pb2.FileAccessLog(path=str(settings.access_log / CURRENT))
    file.log_format.json_format.update(line_format(name))
    return [
        accesslog_pb2.AccessLog(
            name="envoy.access_loggers.file",
            filter=_any(_paths(f"{GRPC_INFERENCE}|{HTTP_INFERENCE}"), *_turned_away()),
            typed_config=packed(file),
        )
    ]


def _turned_away() -> list[accesslog_pb2.AccessLogFilter]:
    """Calls of any kind that were too many, or of somebody who may not make them. Calls refused for memory have no flag; only inference is told."""
    flags = accesslog_pb2.ResponseFlagFilter(flags=["UO", "RL"])
    grpc = accesslog_pb2.GrpcStatusFilter
    statuses = grpc(statuses=[grpc.UNAUTHENTICATED, grpc.PERMISSION_DENIED])
    return [
        accesslog_pb2.AccessLogFilter(response_flag_filter=flags),
        accesslog_pb2.AccessLogFilter(grpc_status_filter=statuses),
        *(_code_is(code) for code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)),
    ]


def _code_is(code: int) -> accesslog_pb2.AccessLogFilter:
    return accesslog_pb2.AccessLogFilter(
        status_code_filter=accesslog_pb2.StatusCodeFilter(
            comparison=accesslog_pb2.ComparisonFilter(
                op=accesslog_pb2.ComparisonFilter.EQ,
                value=base_pb2.RuntimeUInt32(default_value=code, runtime_key="millrace.none"),
            )
        )
    )


def _any(*filters: accesslog_pb2.AccessLogFilter) -> accesslog_pb2.AccessLogFilter:
    return accesslog_pb2.AccessLogFilter(or_filter=accesslog_pb2.OrFilter(filters=filters))


def _paths(pattern: str) -> accesslog_pb2.AccessLogFilter:
    path = route_components_pb2.HeaderMatcher(name=":path")
    path.string_match.safe_regex.CopyFrom(regex_pb2.RegexMatcher(regex=pattern))
    return accesslog_pb2.AccessLogFilter(header_filter=accesslog_pb2.HeaderFilter(header=path))
