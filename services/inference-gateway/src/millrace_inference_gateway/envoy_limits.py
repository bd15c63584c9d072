"""How often clients may call: all together, and each by its name. Counted in Envoy, by each replica for itself."""

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.common.ratelimit.v3 import ratelimit_pb2
from envoy.extensions.filters.http.local_ratelimit.v3 import local_rate_limit_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.type.v3 import token_bucket_pb2
from google.protobuf.wrappers_pb2 import UInt32Value

from millrace_inference_gateway.envoy_access import CLIENT_HEADER
from millrace_inference_gateway.envoy_clusters import duration, packed
from millrace_inference_gateway.settings import AuthSettings, ClientLimit

CLIENTS_FILTER = "millrace.client_limits"
# Clients without a limit of their own that are counted one by one; the one not heard of for longest starts anew.
MAX_CLIENTS = 10_000
_UNLIMITED = 4_000_000_000
_CLIENT = "client"


def all_clients_limit(auth: AuthSettings) -> hcm_pb2.HttpFilter:
    """All clients together."""
    limit = _limit("public", _bucket(auth.calls_per_s, auth.burst))
    return hcm_pb2.HttpFilter(name="envoy.filters.http.local_ratelimit", typed_config=packed(limit))


def each_client_limit(auth: AuthSettings) -> hcm_pb2.HttpFilter:
    """Each client by the name that stands in its calls by now; a call without a name has no limit here."""
    limit = _limit("clients", _bucket(_UNLIMITED, _UNLIMITED))
    limit.descriptors.extend(_descriptor(found, name) for name, found in sorted(auth.clients.items()))
    if auth.each_client is not None:
        # Without a value every name gets a bucket of its own.
        limit.descriptors.append(_descriptor(auth.each_client))
    limit.max_dynamic_descriptors.value = MAX_CLIENTS
    limit.always_consume_default_token_bucket.value = False
    action = route_components_pb2.RateLimit.Action(
        request_headers=route_components_pb2.RateLimit.Action.RequestHeaders(
            header_name=CLIENT_HEADER, descriptor_key=_CLIENT, skip_if_absent=True
        )
    )
    limit.rate_limits.append(route_components_pb2.RateLimit(actions=[action]))
    return hcm_pb2.HttpFilter(name=CLIENTS_FILTER, typed_config=packed(limit))


def _descriptor(limit: ClientLimit, name: str = "") -> ratelimit_pb2.LocalRateLimitDescriptor:
    return ratelimit_pb2.LocalRateLimitDescriptor(
        entries=[ratelimit_pb2.RateLimitDescriptor.Entry(key=_CLIENT, value=name)],
        token_bucket=_bucket(limit.calls_per_s, limit.burst),
    )


def _bucket(calls_per_s: int, burst: int) -> token_bucket_pb2.TokenBucket:
    return token_bucket_pb2.TokenBucket(
        max_tokens=burst or calls_per_s, tokens_per_fill=UInt32Value(value=calls_per_s), fill_interval=duration(1)
    )


def _limit(name: str, bucket: token_bucket_pb2.TokenBucket) -> local_rate_limit_pb2.LocalRateLimit:
    whole = base_pb2.RuntimeFractionalPercent()
    whole.default_value.numerator = 100
    return local_rate_limit_pb2.LocalRateLimit(
        stat_prefix=name,
        token_bucket=bucket,
        filter_enabled=whole,
        filter_enforced=whole,
        rate_limited_as_resource_exhausted=True,
    )
