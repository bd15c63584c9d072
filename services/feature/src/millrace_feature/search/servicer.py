"""The gRPC edge of vector search: check, call, convert."""

import asyncio
from collections.abc import Mapping, Sequence

import grpc.aio
from millrace_api.feature.v1 import feature_pb2, search_pb2, search_pb2_grpc
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

from millrace_feature.convert import MAX_ROWS, RowReader, to_timestamp, to_value
from millrace_feature.plan import Metric, ServicePlan, ViewUse
from millrace_feature.search.service import Found, Hit, Target, VectorSearch
from millrace_feature.tiles import encode_key
from millrace_feature.vectors import unpack
from millrace_feature.versioning.access import Access
from millrace_feature.versioning.servicer import caller_of

SERVICE = "millrace_api.feature.v1.VectorService"
_METRICS: Mapping[int, Metric] = {
    search_pb2.DISTANCE_METRIC_L2: "L2",
    search_pb2.DISTANCE_METRIC_COSINE: "cosine",
    search_pb2.DISTANCE_METRIC_INNER_PRODUCT: "inner_product",
}


class VectorServicer(search_pb2_grpc.VectorServiceServicer):
    """`millrace_api.feature.v1.VectorService`."""

    def __init__(self, search: VectorSearch, access: Access) -> None:
        self._search = search
        self._access = access

    async def SearchVectors(
        self, request: search_pb2.SearchVectorsRequest, context: grpc.aio.ServicerContext
    ) -> search_pb2.SearchVectorsResponse:
        view = check.text(request.view, "view", limit=256)
        if not self._access.is_open:
            await asyncio.to_thread(self._access.check_views, caller_of(context), "read_online", [view])
        target = self._search.target(view, request.feature)
        columns = _columns(target, request.features)
        among = _entities(target, request.among)
        metric = _metric(request.metric)
        found = await self._search.search(target, request.query, request.top_k, metric=metric, among=among)
        return _response(target, found, columns, with_vectors=request.with_vectors)


def _metric(metric: int) -> Metric | None:
    if metric == search_pb2.DISTANCE_METRIC_UNSPECIFIED:
        return None
    if metric not in _METRICS:
        raise InvalidArgumentError("metric", f"{metric} is no known metric")
    return _METRICS[metric]


def _columns(target: Target, names: Sequence[str]) -> list[int]:
    """Places of the features among a row's values."""
    known = target.view.features
    for i, name in enumerate(names):
        if name not in known:
            raise InvalidArgumentError(f"features[{i}]", f"{target.view.name!r} has no feature {name!r}")
        if target.view.vector(name) is not None:
            raise InvalidArgumentError(f"features[{i}]", f"{name!r} is an embedding; ask with with_vectors")
    return [known.index(name) for name in names]


def _entities(target: Target, rows: Sequence[feature_pb2.EntityRow]) -> list[str]:
    """Encoded keys of the entities that a request names, each once."""
    if len(rows) > MAX_ROWS:
        raise InvalidArgumentError("among", f"names more than {MAX_ROWS} entities")
    view = target.view
    plan = ServicePlan(view.name, (), (ViewUse(view.name, view.name, view.join_keys),), (), ())
    keys: dict[str, None] = {}
    for i, row in enumerate(RowReader(plan, target.definitions).read(rows, "among")):
        if missing := [name for name in view.join_keys if row[name] is None]:
            raise InvalidArgumentError(f"among[{i}]", f"needs join key {missing[0]!r}")
        keys[encode_key([row[name] for name in view.join_keys])] = None
    return list(keys)


def _response(
    target: Target, found: Found, columns: Sequence[int], *, with_vectors: bool
) -> search_pb2.SearchVectorsResponse:
    place = target.view.features.index(target.field.feature)

    def hit(one: Hit) -> search_pb2.VectorHit:
        content = one.values[place]
        return search_pb2.VectorHit(
            entity={name: to_value(key) for name, key in zip(target.view.join_keys, one.key, strict=True)},
            distance=one.distance,
            values=[to_value(one.values[column]) for column in columns],
            vector=unpack(content, is_wide=target.field.is_wide) if with_vectors and isinstance(content, bytes) else (),
            event_time=to_timestamp(one.time_us),
        )

    return search_pb2.SearchVectorsResponse(
        hits=[hit(one) for one in found.hits],
        definitions_hash=target.definitions.digest,
        index_age_ms=found.index_age_ms,
        index_rows=found.index_rows,
    )
