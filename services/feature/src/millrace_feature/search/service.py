"""Searches: the index names the nearest entities, the online store says what they are.

A hit's distance, features and event time come from one row that the store had when the search was answered, so they fit each other; the
index may be behind, and says how far.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError, UnavailableError

from millrace_feature.plan import Definitions, LatestView, Metric, VectorField
from millrace_feature.rows import Scalar
from millrace_feature.search.distances import distances
from millrace_feature.search.following import IndexFollower
from millrace_feature.search.index import IndexFullError, VectorIndex
from millrace_feature.search.metrics import SEARCH_SECONDS, SEARCHES
from millrace_feature.serving import Serving
from millrace_feature.settings import VectorSearchSettings
from millrace_feature.store import LatestAsk, NewestRow
from millrace_feature.tiles import Floats, decode_key
from millrace_feature.vectors import Numbers, dtype
from millrace_feature.worker import to_us

MAX_TOP_K = 1_000
SPARE = 16
"""Entities looked at beyond `top_k`, in place of those that the store no longer has as the index had them."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is searched."""

    definitions: Definitions
    view: LatestView
    field: VectorField


@dataclass(frozen=True, slots=True)
class Hit:
    """An entity that was found."""

    key: tuple[str | int, ...]
    """Join keys in the view's order."""
    distance: float
    time_us: int
    values: tuple[Scalar, ...]
    """Of all features of the view, as they are stored."""


@dataclass(frozen=True, slots=True)
class Found:
    """The answer of a search."""

    hits: Sequence[Hit]
    index_age_ms: int = 0
    index_rows: int = 0


class VectorSearch:
    """Answers searches over the definitions in force."""

    def __init__(
        self, *, serving: Serving[Any], follower: IndexFollower, settings: VectorSearchSettings, clock: Clock
    ) -> None:
        self._serving = serving
        self._follower = follower
        self._clock = clock
        self._turns = asyncio.Semaphore(settings.max_concurrent)
        self._limit = settings.max_concurrent + settings.max_waiting
        self._running = 0

    def definitions(self) -> Definitions:
        """Those in force.

        Raises:
            UnavailableError: none are ready yet.
        """
        found = self._serving.definitions
        if found is None:
            raise UnavailableError("DEFINITIONS_NOT_READY", "no definitions are applied, or their backfill is running")
        return found

    def target(self, view: str, feature: str) -> Target:
        """The embedding called `feature` of a view; an empty name is its only one with a `vector_index`.

        Raises:
            UnavailableError: no definitions are ready yet.
            NotFoundError: there is no such view.
            InvalidArgumentError: the feature is no embedding that can be searched, or it must be named.
        """
        definitions = self.definitions()
        found = next((v for v in definitions.views if v.name == view), None)
        if found is None:
            raise NotFoundError("feature view", view)
        fields = [f for f in found.vectors if f.metric is not None] if isinstance(found, LatestView) else []
        if feature:
            fields = [field for field in fields if field.feature == feature]
        if not fields or not isinstance(found, LatestView):
            raise InvalidArgumentError("feature", f"{view!r} has no embedding {feature!r} with a vector_index")
        if len(fields) > 1:
            names = ", ".join(field.feature for field in fields)
            raise InvalidArgumentError("feature", f"must name one of the embeddings of {view!r}: {names}")
        return Target(definitions, found, fields[0])

    async def search(
        self,
        target: Target,
        query: Sequence[float],
        top_k: int,
        *,
        metric: Metric | None = None,
        among: Sequence[str] = (),
    ) -> Found:
        """The `top_k` entities nearest to `query`, nearest first.

        Args:
            target: see `target`.
            query: as many numbers as the embedding has.
            top_k: 1 to `MAX_TOP_K`.
            metric: None takes the embedding's own.
            among: only these encoded entities are looked at; empty looks at all.

        Raises:
            InvalidArgumentError: the query or `top_k` is wrong.
            ResourceExhaustedError: too many searches wait, or the vectors do not fit into memory.
            UnavailableError: the index is being made, or the store does not answer.
        """
        if not 1 <= top_k <= MAX_TOP_K:
            raise InvalidArgumentError("top_k", f"must be 1 to {MAX_TOP_K}, not {top_k}")
        metric = metric or target.field.metric
        assert metric is not None
        numbers = checked_query(query, target, metric)
        started = time.perf_counter()
        async with self._turn():
            if among:
                found = Found(self._ranked(target, among, await self._rows(target, among), numbers, metric)[:top_k])
            else:
                found = await self._search(target, numbers, top_k, metric)
        SEARCH_SECONDS.observe(time.perf_counter() - started)
        SEARCHES.labels(target.view.name).inc()
        return found

    async def _search(self, target: Target, query: Floats, top_k: int, metric: Metric) -> Found:
        index = self._index(target)
        count = top_k + SPARE
        while True:
            age_ms, rows = self._follower.age_ms(), index.rows
            ttl_us = target.view.ttl_us
            oldest_us = to_us(self._clock.now()) - ttl_us if ttl_us else None
            keys = await asyncio.to_thread(index.nearest, query, metric, count, oldest_us=oldest_us)
            hits = self._ranked(target, keys, await self._rows(target, keys), query, metric)
            if len(hits) >= top_k or len(keys) < count:
                return Found(hits[:top_k], age_ms, rows)
            count *= 4

    def _index(self, target: Target) -> VectorIndex:
        try:
            index = self._follower.index(target.view, target.field)
        except IndexFullError:
            message = f"the vectors of {target.view.name!r} do not fit into vector_search.max_memory_mib"
            raise ResourceExhaustedError("vector_search.max_memory_mib", message) from None
        if index is None:
            message = f"the vectors of {target.view.name!r} are being indexed; try again"
            raise UnavailableError("VECTOR_INDEX_NOT_READY", message, {"view": target.view.name})
        return index

    async def _rows(self, target: Target, keys: Sequence[str]) -> list[NewestRow | None]:
        if not keys:
            return []
        ask = LatestAsk(target.view.group, keys, to_us(self._clock.now()), len(target.view.features))
        return (await self._serving.store.fetch([ask], [])).latest(ask)

    def _ranked(
        self, target: Target, keys: Sequence[str], rows: Sequence[NewestRow | None], query: Floats, metric: Metric
    ) -> list[Hit]:
        """The entities that have a vector by now, nearest first."""
        view = target.view
        column = view.features.index(target.field.feature)
        oldest_us = to_us(self._clock.now()) - view.ttl_us if view.ttl_us else None
        known = {
            key: row
            for key, row in zip(keys, rows, strict=True)
            if row is not None and row[1][column] is not None and (oldest_us is None or row[0] >= oldest_us)
        }
        if not known:
            return []
        vectors: Numbers = np.frombuffer(
            b"".join(_bytes(row[1][column]) for row in known.values()), dtype(target.field)
        )
        far = distances(vectors.reshape(len(known), -1), query, metric).tolist()
        kinds = dict(target.definitions.key_types)
        readers: list[Callable[[str], str | int]] = [int if kinds[k] == "int64" else str for k in view.join_keys]
        return [
            Hit(tuple(read(v) for read, v in zip(readers, decode_key(key, len(readers)), strict=True)), distance, *row)
            for distance, key, row in sorted(zip(far, known, known.values(), strict=True), key=lambda item: item[:2])
        ]

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._running >= self._limit:
            message = f"{self._running} searches run or wait; retry later"
            raise ResourceExhaustedError("vector_search.max_waiting", message)
        self._running += 1
        try:
            async with self._turns:
                yield
        finally:
            self._running -= 1


def checked_query(query: Sequence[float], target: Target, metric: Metric) -> Floats:
    """The query as float64.

    Raises:
        InvalidArgumentError: it has another length than the embedding, a number that is not finite, or no direction where one is needed.
    """
    numbers = np.asarray(query, np.float64)
    if numbers.shape != (target.field.length,):
        problem = f"has {len(query)} numbers; {target.view.name}.{target.field.feature} has {target.field.length}"
        raise InvalidArgumentError("query", problem)
    if not np.isfinite(numbers).all():
        raise InvalidArgumentError("query", "holds a number that is not finite")
    if metric == "cosine" and not numbers.any():
        raise InvalidArgumentError("query", "is all zeros, which has no direction to compare")
    return numbers


def _bytes(value: Scalar) -> bytes:
    assert isinstance(value, bytes)
    return value
