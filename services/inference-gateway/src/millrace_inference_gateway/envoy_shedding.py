"""What Envoy says to calls it turns away because there are too many, and how much it takes as a whole.

Each such answer (but those for want of memory, which Envoy words by itself) says when to come again: `retry-after` by HTTP, by gRPC `grpc-retry-pushback-ms`, which clients with a retry policy obey, and
`google.rpc.RetryInfo`.
"""

import math

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.config.core.v3 import substitution_format_string_pb2
from envoy.config.overload.v3 import overload_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.resource_monitors.downstream_connections.v3 import downstream_connections_pb2
from envoy.extensions.resource_monitors.fixed_heap.v3 import fixed_heap_pb2
from envoy.service.runtime.v3 import rtds_pb2
from envoy.type.matcher.v3 import string_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from millrace_inference_gateway.envoy_actions import header, status_details
from millrace_inference_gateway.envoy_clusters import duration, file_source, packed
from millrace_inference_gateway.envoy_files import EnvoyFiles, write_resources
from millrace_inference_gateway.settings import EnvoySettings

LIMITS_NAME = "found_limits"
UNAVAILABLE, RESOURCE_EXHAUSTED = 14, 8
# Shares of `max_memory_mib` at which new calls are turned away, and at which those end that hold most.
MEMORY_FULL, MEMORY_OVER = 0.95, 0.98
MEMORY_CHECK_S = 0.25
MEMORY = "envoy.resource_monitors.fixed_heap"
CONNECTIONS = "envoy.resource_monitors.global_downstream_max_connections"
# Of calls that end for memory, only those that hold at least so much (a power of two).
LARGE_CALL_BYTES_LOG2 = 20
_MODEL = "%REQ(X-MILLRACE-MODEL)%"


def shedding_answers(settings: EnvoySettings) -> hcm_pb2.LocalReplyConfig:
    """Answers to calls above a limit: gRPC statuses with details, JSON by HTTP."""
    found = hcm_pb2.LocalReplyConfig()
    full = f"model {_MODEL}: has as many requests under way as it can take now"
    for flag, code, reason, text in (
        ("UO", UNAVAILABLE, "OVERLOADED", full),
        ("RL", RESOURCE_EXHAUSTED, "RATE_LIMITED", "more calls than this client, or all together, may make"),
    ):
        found.mappers.append(_grpc_answer(flag, code, reason, text, settings))
        found.mappers.append(_http_answer(flag, text, settings))
    return found


def write_limits(files: EnvoyFiles, values: dict[str, int]) -> None:
    """Give Envoy these runtime values, and no others."""
    layer = rtds_pb2.Runtime(name=LIMITS_NAME)
    layer.layer.update(dict(sorted(values.items())))
    write_resources(files.limits, [layer])


def add_limits(message: bootstrap_pb2.Bootstrap, settings: EnvoySettings, files: EnvoyFiles) -> None:
    """Have Envoy read the runtime values of `write_limits`, and watch its own memory and connections."""
    layer = message.layered_runtime.layers.add(name=LIMITS_NAME)
    layer.rtds_layer.name = LIMITS_NAME
    layer.rtds_layer.rtds_config.CopyFrom(file_source(str(files.limits)))
    overload = message.overload_manager
    if settings.max_memory_mib:
        overload.refresh_interval.CopyFrom(duration(MEMORY_CHECK_S))
        heap = fixed_heap_pb2.FixedHeapConfig(max_heap_size_bytes=settings.max_memory_mib << 20)
        _monitor(overload, MEMORY, heap)
        _act(overload, "envoy.overload_actions.stop_accepting_requests", MEMORY_FULL)
        _act(overload, "envoy.overload_actions.reset_high_memory_stream", MEMORY_OVER, scaled_to=1.0)
        overload.buffer_factory_config.minimum_account_to_track_power_of_two = LARGE_CALL_BYTES_LOG2
    if settings.max_client_connections:
        _monitor(
            overload,
            CONNECTIONS,
            downstream_connections_pb2.DownstreamConnectionsConfig(
                max_active_downstream_connections=settings.max_client_connections
            ),
        )


def _monitor(overload: overload_pb2.OverloadManager, name: str, config: Message) -> None:
    overload.resource_monitors.append(overload_pb2.ResourceMonitor(name=name, typed_config=packed(config)))


def _act(overload: overload_pb2.OverloadManager, name: str, share: float, *, scaled_to: float = 0.0) -> None:
    trigger = overload_pb2.Trigger(name=MEMORY)
    if scaled_to:
        trigger.scaled.scaling_threshold = share
        trigger.scaled.saturation_threshold = scaled_to
    else:
        trigger.threshold.value = share
    overload.actions.append(overload_pb2.OverloadAction(name=name, triggers=[trigger]))


def _grpc_answer(flag: str, code: int, reason: str, text: str, settings: EnvoySettings) -> hcm_pb2.ResponseMapper:
    details = status_details(code, reason, error_details_pb2.RetryInfo(retry_delay=duration(settings.retry_after_s)))
    mapper = hcm_pb2.ResponseMapper(
        filter=accesslog_pb2.AccessLogFilter(and_filter=accesslog_pb2.AndFilter(filters=[_flagged(flag), _by_grpc()])),
        headers_to_add=[
            header("grpc-status", str(code)),
            header("grpc-status-details-bin", details),
            header("grpc-retry-pushback-ms", str(round(settings.retry_after_s * 1000))),
        ],
    )
    mapper.body_format_override.text_format_source.inline_string = f"{text}; try again in {settings.retry_after_s:g} s"
    return mapper


def _http_answer(flag: str, text: str, settings: EnvoySettings) -> hcm_pb2.ResponseMapper:
    mapper = hcm_pb2.ResponseMapper(
        filter=_flagged(flag),
        headers_to_add=[header("retry-after", str(math.ceil(settings.retry_after_s)))],
    )
    form = substitution_format_string_pb2.SubstitutionFormatString()
    form.json_format.update({"error": f"{text}; try again in {settings.retry_after_s:g} s"})
    mapper.body_format_override.CopyFrom(form)
    return mapper


def _flagged(flag: str) -> accesslog_pb2.AccessLogFilter:
    return accesslog_pb2.AccessLogFilter(response_flag_filter=accesslog_pb2.ResponseFlagFilter(flags=[flag]))


def _by_grpc() -> accesslog_pb2.AccessLogFilter:
    kind = route_components_pb2.HeaderMatcher(
        name="content-type", string_match=string_pb2.StringMatcher(prefix="application/grpc")
    )
    return accesslog_pb2.AccessLogFilter(header_filter=accesslog_pb2.HeaderFilter(header=kind))
