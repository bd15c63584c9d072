"""Who may call a model, and who may choose its version: Envoy's RBAC filter, with what each route allows.

The filter stands behind authentication and behind the choice of the route, so that it judges the caller it knows by the model that is
called in the end.
"""

from collections.abc import Sequence

from envoy.config.rbac.v3 import rbac_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as filter_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.type.matcher.v3 import string_pb2
from google.protobuf.any_pb2 import Any

from millrace_inference_gateway.envoy_clusters import packed
from millrace_inference_gateway.routes import ANYBODY, Route

ACCESS_FILTER = "millrace.access"
CLIENT_HEADER = "x-millrace-client"
# What a token says of its client's groups, each between commas; and how a caller's name means one.
GROUPS_HEADER, GROUP = "x-millrace-groups", "group:"


def access_filter() -> hcm_pb2.HttpFilter:
    """The filter; without a route's word it lets everybody pass."""
    return hcm_pb2.HttpFilter(name=ACCESS_FILTER, typed_config=packed(filter_pb2.RBAC()))


def access_options(route: Route, *, pinned: bool) -> dict[str, Any]:
    """What the filter asks of callers of the route; `pinned` is for calls that choose their version."""
    lists = [route.callers]
    if pinned:
        lists.append(route.testers)
    asked = [names for names in lists if names and ANYBODY not in names]
    if not asked:
        return {}
    everything = rbac_pb2.Permission(any=True)
    both = rbac_pb2.Principal(and_ids=rbac_pb2.Principal.Set(ids=[_one_of(names) for names in asked]))
    policy = rbac_pb2.Policy(permissions=[everything], principals=[both])
    rules = rbac_pb2.RBAC(action=rbac_pb2.RBAC.ALLOW, policies={"callers": policy})
    return {ACCESS_FILTER: packed(filter_pb2.RBACPerRoute(rbac=filter_pb2.RBAC(rules=rules)))}


def _one_of(names: Sequence[str]) -> rbac_pb2.Principal:
    return rbac_pb2.Principal(or_ids=rbac_pb2.Principal.Set(ids=[_caller(name) for name in names]))


def _caller(name: str) -> rbac_pb2.Principal:
    if name.startswith(GROUP):
        header, match = GROUPS_HEADER, string_pb2.StringMatcher(contains=f",{name.removeprefix(GROUP)},")
    else:
        header, match = CLIENT_HEADER, string_pb2.StringMatcher(exact=name)
    return rbac_pb2.Principal(header=route_components_pb2.HeaderMatcher(name=header, string_match=match))
