"""Searches of Feast's clients (`retrieve_online_documents` and its second version): JSON in, JSON out.

The answer has a column for each feature asked for, one for the distance and one for each join key, as Feast's own server writes them.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from millrace_kit.errors import InvalidArgumentError, NotFoundError

from millrace_feature.feast_wire.errors import no_feature, no_view
from millrace_feature.feast_wire.json_answers import stamp
from millrace_feature.feast_wire.requests import BodyError
from millrace_feature.feast_wire.selection import parsed_reference
from millrace_feature.feast_wire.values import CONVERTERS
from millrace_feature.plan import Metric
from millrace_feature.search.service import Hit, Target, VectorSearch
from millrace_feature.vector_fields import known_metrics, metric_of
from millrace_feature.versioning.access import Access, Caller

DISTANCE = "distance"
_encode = msgspec.json.Encoder().encode


class _Body(msgspec.Struct):
    features: list[str] = []
    feature_service: str | None = None
    full_feature_names: bool = False
    top_k: int | None = None
    api_version: int = 1
    query: list[float] | None = None
    query_string: str | None = None
    distance_metric: str | None = None
    filters: Any = None


_DECODER = msgspec.json.Decoder(_Body)


class FeastSearches:
    """Answers searches as Feast's clients send them."""

    def __init__(self, search: VectorSearch, access: Access) -> None:
        self._search = search
        self._access = access

    async def answer(self, body: bytes, caller: Caller) -> tuple[bytes, int]:
        """(the answer's body, age of the index in milliseconds).

        Raises:
            BodyError: the body is no search.
            MillraceError: it names what does not exist or is not served, or the caller may not read it.
        """
        try:
            asked = _DECODER.decode(body)
        except msgspec.DecodeError as error:
            raise BodyError(str(error)) from None
        _check_served(asked)
        view, features = _one_view(asked.features)
        if not self._access.is_open:
            await asyncio.to_thread(self._access.check_views, caller, "read_online", [view])
        try:
            target = self._search.target(view, "")
        except NotFoundError:
            raise no_view(view, self._search.definitions().project) from None
        names = [name for name in dict.fromkeys(features) if name not in {*target.view.join_keys, DISTANCE}]
        for name in names:
            if name not in target.view.features:
                raise no_feature(view, name)
        found = await self._search.search(
            target, asked.query or (), asked.top_k or 0, metric=_metric(asked.distance_metric)
        )
        hits = found.hits if asked.api_version == 1 else _by_key(target, found.hits)
        return _answer(target, names, hits, full_names=asked.full_feature_names), found.index_age_ms


def _by_key(target: Target, hits: Sequence[Hit]) -> list[Hit]:
    """The hits in the order of their join keys.

    The second version of Feast's client gives the first row's features to the entity that sorts first, the second row's to the next, and so
    on (0.67, `_get_unique_entities_from_values`), so only rows in this order arrive as they were sent. Their distances say which is nearest.
    """
    view = target.view
    order = [view.join_keys.index(key) for key in view.feast_keys if key in view.join_keys]
    return sorted(hits, key=lambda hit: [hit.key[place] for place in order])


def _check_served(asked: _Body) -> None:
    if asked.query_string is not None:
        raise InvalidArgumentError(
            "query_string", "searches of texts are not served; send the text's embedding as query"
        )
    if asked.filters is not None:
        raise InvalidArgumentError("filters", "are not served; VectorService.SearchVectors looks among entities")
    if asked.feature_service:
        raise InvalidArgumentError("feature_service", "is not taken; name the features of one view")
    if asked.query is None:
        raise InvalidArgumentError("query", "is needed: the vector whose neighbours are looked for")
    if asked.top_k is None:
        raise InvalidArgumentError("top_k", "is needed")


def _one_view(references: Sequence[str]) -> tuple[str, list[str]]:
    found = [parsed_reference(reference, f"features[{i}]") for i, reference in enumerate(references)]
    if not found:
        raise InvalidArgumentError("features", "names no feature")
    views = {view for view, _feature in found}
    if len(views) > 1:
        raise InvalidArgumentError("features", "must be of one view")
    return found[0][0], [feature for _view, feature in found]


def _metric(name: str | None) -> Metric | None:
    if not name:
        return None
    metric = metric_of(name)
    if metric is None:
        raise InvalidArgumentError("distance_metric", f"{name!r} is none of {known_metrics()}")
    return metric


def _answer(target: Target, names: Sequence[str], hits: Sequence[Hit], *, full_names: bool) -> bytes:
    view = target.view
    types = dict(target.definitions.feast_types)
    kinds, key_kinds = dict(types.get(view.name, ())), dict(types.get("", ()))
    statuses = ["PRESENT"] * len(hits)
    times = [stamp(hit.time_us) for hit in hits]
    columns = [CONVERTERS[kinds[name]]([hit.values[view.features.index(name)] for hit in hits]) for name in names]
    columns.append([hit.distance for hit in hits])
    for place, key in enumerate(view.join_keys):
        values = [hit.key[place] for hit in hits]
        columns.append(list(map(str, values)) if key_kinds.get(key) == "STRING" else values)
    titles = [*names, DISTANCE]
    if full_names:
        titles = [f"{view.name}__{name}" for name in titles]
    results = [{"values": column, "statuses": statuses, "event_timestamps": times} for column in columns]
    return _encode({"results": results, "metadata": {"feature_names": [*titles, *view.join_keys]}})
