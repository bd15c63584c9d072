"""Online reads: from entity rows to feature vectors, without touching Feast or SQL, and with one round trip to a store elsewhere."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Generic, TypeVar

import numpy as np
from millrace_kit.errors import FailedPreconditionError, NotFoundError, UnavailableError

from millrace_feature.cache import OnlineCache
from millrace_feature.float_parts import ROWS, FloatPart, VectorTable
from millrace_feature.plan import Definitions, LatestView, ServicePlan, ViewUse, WindowView
from millrace_feature.store import Answers, Ask, LatestAsk, OnlineStore, WindowAsk
from millrace_feature.tiles import encode_key
from millrace_feature.transforms import TransformRunner, or_none
from millrace_feature.vector_picking import ElementPicker, readers_of, whole_feature
from millrace_feature.windows import NAN, WindowReader

PRESENT, MISSING, EXPIRED = 1, 2, 3
ROWS_ON_LOOP, LIGHT_ROWS_ON_LOOP = 16, 256
"""Most rows of a read that are computed in the event loop: where windows are merged or functions run, and where rows are only copied."""

Entity = Mapping[str, Any]
"""Join keys and request fields of one row by name; None where missing."""


@dataclass(frozen=True, slots=True)
class Vector:
    """Features of one row in the service's order."""

    values: list[float]
    statuses: list[int]
    max_age_ms: int


@dataclass(slots=True)
class Part:
    """What one view or transform gives for every row: lists of values, None for a view without a row."""

    values: list[Any]
    expired: set[int]
    ages_us: list[int]
    times_us: list[int | None]
    """Event time of what each row's values come from; None where there is none. A window's is its end, or the watermark."""


Vectors = list[Vector] | VectorTable
"""One vector per row."""
ViewAges = Sequence[Sequence[int]]
"""Age of each row's values [rows, views] in milliseconds; -1 where a view gave none."""


class _Source:
    """One view as a service uses it, ready to read."""

    def __init__(self, use: ViewUse, view: WindowView | LatestView) -> None:
        self.use = use
        self.view = view
        self.group = view.group
        self.reader = WindowReader(view) if isinstance(view, WindowView) else None
        self.features = view.features
        self.unpack = readers_of(view)
        """Of each embedding what reads its stored value, as on-demand functions take it."""
        self._single = use.keys[0] if len(use.keys) == 1 else None

    def full_name(self, place: int) -> str:
        """What the feature at `place` is called in a service."""
        return f"{self.use.alias}__{self.features[place]}"

    def keys(self, rows: Sequence[Entity]) -> list[str | None]:
        """The encoded entity per row; None where a join key is missing."""
        if self._single is not None:
            return [None if (value := row.get(self._single)) is None else str(value) for row in rows]
        found: list[list[Any]] = [[row.get(name) for name in self.use.keys] for row in rows]
        return [None if None in values else encode_key(values) for values in found]

    def ask(self, keys: Sequence[str | None], at_us: int) -> Ask:
        """What the store has to know for a read of `keys` at `at_us`."""
        if self.reader is not None:
            return WindowAsk(self.group, self.reader, keys, at_us // self.reader.hop_us)
        return LatestAsk(self.group, keys, at_us, len(self.features))

    def part(self, ask: Ask, known: Answers, at_us: int) -> Part | FloatPart:
        """The view's features at `at_us`."""
        if isinstance(ask, WindowAsk):
            followed = known.followed.get(self.view.contract)
            complete_us = ask.reader.complete_us(ask.end_hop)
            watermark_us = followed.watermark_us if followed is not None else None
            age = 0 if watermark_us is None else at_us - min(complete_us, watermark_us)
            time_us = None if watermark_us is None else at_us - age
            return Part(known.windows(ask), set(), [age], [None if key is None else time_us for key in ask.keys])
        assert isinstance(self.view, LatestView)
        ttl_us = self.view.ttl_us
        if len(ask.keys) >= ROWS and (floats := known.floats(ask)) is not None:
            return FloatPart(*floats, ttl_us=ttl_us, at_us=at_us)
        part = Part([], set(), [], [])
        for i, found in enumerate(known.latest(ask)):
            if found is None:
                part.values.append(None)
                part.times_us.append(None)
                continue
            part.times_us.append(found[0])
            if ttl_us and at_us - found[0] > ttl_us:
                part.values.append(None)
                part.expired.add(i)
            else:
                part.values.append(found[1])
                part.ages_us.append(at_us - found[0])
        return part


class CompiledService:
    """A service plan with its functions loaded and its positions computed."""

    def __init__(self, plan: ServicePlan, definitions: Definitions) -> None:
        self.plan = plan
        self.digest = definitions.digest
        self.views = tuple(use.view for use in plan.uses)
        self.contracts = tuple(sorted({definitions.view(use.view).contract for use in plan.uses}))
        self.fresh_contracts = frozenset(
            view.contract
            for view in (definitions.view(use.view) for use in plan.uses)
            if isinstance(view, WindowView) and view.head_us
        )
        self._sources = [_Source(use, definitions.view(use.view)) for use in plan.uses]
        self._runners = [TransformRunner(transform) for transform in plan.transforms]
        self.places = self._places()
        """(part, place among its values) of each feature in vector order; parts are the sources, then the transforms."""
        self._pieces = self._layout()
        self._piece_columns = self._columns_of_pieces()

    @property
    def rows_on_loop(self) -> int:
        """Reads of more rows are computed in a thread, so that other calls are not held up."""
        is_light = not self._runners and all(source.reader is None for source in self._sources)
        return LIGHT_ROWS_ON_LOOP if is_light else ROWS_ON_LOOP

    def is_stored(self, part: int) -> bool:
        """Whether a part's values are newest rows as they were stored, not computed numbers."""
        return part < len(self._sources) and self._sources[part].reader is None

    def _places(self) -> list[tuple[int, int]]:
        names = [s.use.alias for s in self._sources] + [r.plan.name for r in self._runners]
        known = [s.features for s in self._sources] + [r.plan.outputs for r in self._runners]
        views = [s.view for s in self._sources]
        places: list[tuple[int, int]] = []
        for full_name in self.plan.features:
            # An alias may itself hold "__", so the longest part that fits is the right one.
            found = [
                (len(name), i, feature)
                for i, name in enumerate(names)
                if full_name.startswith(f"{name}__")
                and (feature := whole_feature(full_name[len(name) + 2 :], known[i], views[i : i + 1])) is not None
            ]
            _length, part, feature = max(found)
            places.append((part, known[part].index(feature)))
        return places

    def _layout(self) -> list[tuple[int, Any, int]]:
        """(part, picker of its values, number of features) in vector order."""
        pieces: list[tuple[int, Any, int]] = []
        chosen: list[tuple[int, bool, list[int], list[str]]] = []
        for (part, place), name in zip(self.places, self.plan.features, strict=True):
            is_element = part < len(self._sources) and name != self._sources[part].full_name(place)
            if chosen and chosen[-1][:2] == (part, is_element) and (not is_element or chosen[-1][2][0] == place):
                chosen[-1][2].append(place)
                chosen[-1][3].append(name)
            else:
                chosen.append((part, is_element, [place], [name]))
        for part, is_element, places, features in chosen:
            if is_element:
                source = self._sources[part]
                numbers = [int(name.rpartition("__")[2]) for name in features]
                picker: Any = ElementPicker(places[0], source.unpack[source.features[places[0]]], numbers)
            else:
                picker = itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))
            pieces.append((part, picker, len(places)))
        return pieces

    def _columns_of_pieces(self) -> list[slice | list[int]]:
        """Per piece where its features stand among its part's values."""
        out: list[slice | list[int]] = []
        at = 0
        for _part, _picker, size in self._pieces:
            places = [place for _number, place in self.places[at : at + size]]
            follow = places == list(range(places[0], places[0] + size))
            out.append(slice(places[0], places[0] + size) if follow else places)
            at += size
        return out

    def asks(self, rows: Sequence[Entity], at_us: int) -> list[Ask]:
        """What the store has to know, per view."""
        known: dict[tuple[str, ...], list[str | None]] = {}
        for source in self._sources:
            if source.use.keys not in known:
                known[source.use.keys] = source.keys(rows)
        return [source.ask(known[source.use.keys], at_us) for source in self._sources]

    def parts(self, asks: Sequence[Ask], known: Answers, rows: Sequence[Entity], at_us: int) -> list[Part | FloatPart]:
        """What each source and then each transform gives at `at_us` (microseconds since the epoch)."""
        parts: list[Part | FloatPart] = [
            source.part(ask, known, at_us) for source, ask in zip(self._sources, asks, strict=True)
        ]
        if self._runners:
            columns = self._inputs(parts, len(rows))
            request = {name: [row.get(name) for row in rows] for name, _kind in self.plan.request_fields}
            for runner in self._runners:
                outputs = runner.run(columns, request, len(rows))
                columns.update(runner.placed(outputs))
                parts.append(Part(list(zip(*outputs, strict=True)), set(), [], [None] * len(rows)))
        return parts

    def vectors(self, asks: Sequence[Ask], known: Answers, rows: Sequence[Entity], at_us: int) -> Vectors:
        """One vector per row, as known at `at_us` (microseconds since the epoch)."""
        return self.vectors_of(self.parts(asks, known, rows, at_us), len(rows))

    def aged_vectors(
        self, asks: Sequence[Ask], known: Answers, rows: Sequence[Entity], at_us: int, *, by_view: bool
    ) -> tuple[Vectors, ViewAges | None]:
        """One vector per row, and with `by_view` how old each row's values are."""
        parts = self.parts(asks, known, rows, at_us)
        return self.vectors_of(parts, len(rows)), self.ages_ms(parts, len(rows), at_us) if by_view else None

    def vectors_of(self, parts: Sequence[Part | FloatPart], rows: int) -> Vectors:
        """One vector per row of what the sources and transforms gave."""
        stored = len(self._sources)
        age_ms = max((max(part.ages_us) for part in parts if part.ages_us), default=0) // 1000
        pieces = [parts[number] for number, _picker, _size in self._pieces]
        arrays = [
            (p, places) for p, places in zip(pieces, self._piece_columns, strict=True) if isinstance(p, FloatPart)
        ]
        if len(arrays) == len(pieces):
            return VectorTable.of(arrays, age_ms, present=PRESENT, missing=MISSING, expired=EXPIRED)
        return [self._vector(parts, stored, i, age_ms) for i in range(rows)]

    @property
    def view_names(self) -> tuple[str, ...]:
        """Views that are read, by the names the service knows them by."""
        return tuple(use.alias for use in self.plan.uses)

    def ages_ms(self, parts: Sequence[Part | FloatPart], rows: int, at_us: int) -> ViewAges:
        """How old each row's values are; a service of on-demand views alone reads none."""
        columns: list[list[int]] = []
        for part in parts[: len(self._sources)]:
            if isinstance(part, FloatPart):
                columns.append(np.where(part.gone, -1, (at_us - part.instants) // 1000).tolist())
            else:
                gone = part.expired
                columns.append(
                    [
                        -1 if time_us is None or row in gone else (at_us - time_us) // 1000
                        for row, time_us in enumerate(part.times_us)
                    ]
                )
        return list(zip(*columns, strict=True)) if columns else [()] * rows

    def row_values(self, parts: Sequence[Part | FloatPart], row: int) -> Sequence[float]:
        """The vector of one row."""
        return self._vector(parts, len(self._sources), row, 0).values

    def _inputs(self, parts: Sequence[Part | FloatPart], rows: int) -> dict[tuple[str, str], list[Any]]:
        """Columns the transforms read, by (alias, feature)."""
        wanted = {pair for runner in self._runners for pair in runner.plan.inputs}
        columns: dict[tuple[str, str], list[Any]] = {}
        for source, part in zip(self._sources, parts, strict=False):
            for place, feature in enumerate(source.features):
                if (source.use.alias, feature) not in wanted:
                    continue
                column: list[Any]
                if source.reader is not None:
                    column = [or_none(part.values[i][place]) for i in range(rows)]
                else:
                    column = [None if part.values[i] is None else part.values[i][place] for i in range(rows)]
                if feature in source.unpack:
                    read = source.unpack[feature]
                    column = [read(value) if isinstance(value, bytes) else None for value in column]
                columns[source.use.alias, feature] = column
        return columns

    def _vector(self, parts: Sequence[Part | FloatPart], stored: int, row: int, age_ms: int) -> Vector:
        values: list[float] = []
        statuses: list[int] = []
        for number, picker, size in self._pieces:
            part = parts[number]
            found = part.values[row]
            if found is None:
                values += [NAN] * size
                statuses += [EXPIRED if row in part.expired else MISSING] * size
                continue
            picked = picker(found)
            if number < stored and self._sources[number].reader is None:
                picked = [NAN if value is None else float(value) for value in picked]
            values += picked
            statuses += [PRESENT if value == value else MISSING for value in picked]  # noqa: PLR0124 - NaN is not itself
        return Vector(values, statuses, age_ms)


def _values(vectors: Vectors, row: int) -> Sequence[float]:
    return vectors.row(row) if isinstance(vectors, VectorTable) else vectors[row].values


Observe = Callable[[CompiledService, Sequence[Entity], int, Callable[[int], Sequence[float]]], None]
"""Told every answer: the service, its rows, the asked instant (microseconds) and a row's vector on demand. It must not wait."""

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Ready(Generic[R]):
    """One service that can be read."""

    service: CompiledService
    reader: R
    """Turns the caller's rows into `Entity` values; made by the edge."""
    digest: str


class Serving(Generic[R]):
    """The definitions reads are answered with; the stream worker swaps them once their data is there."""

    def __init__(
        self,
        store: OnlineStore,
        *,
        read_behind_us: int,
        head_behind_us: int,
        reader_of: Callable[[ServicePlan, Definitions], R],
        observe: Observe | None = None,
        cache: OnlineCache | None = None,
    ) -> None:
        self.store = store
        self._observe = observe
        self._cache = cache
        self._read_behind_us = read_behind_us
        self._head_behind_us = head_behind_us
        self._reader_of = reader_of
        self._services: dict[str, Ready[R]] | None = None
        self._kept: dict[str, dict[str, Ready[R]]] = {}
        """Services of definitions that are served when their hash is named, by hash."""
        self.definitions: Definitions | None = None
        """What reads are answered with."""

    @property
    def is_active(self) -> bool:
        """Whether reads are answered."""
        return self._services is not None

    def activate(self, definitions: Definitions, kept: Sequence[Definitions] = ()) -> None:
        """Answer with `definitions` from now on, and with `kept` who names their hash."""
        others = {other.digest: self._compiled(other) for other in kept}
        services = self._compiled(definitions)
        self._services, self._kept = services, {**others, definitions.digest: services}
        self.definitions = definitions
        if self._cache is not None:
            self._cache.clear()

    def _compiled(self, definitions: Definitions) -> dict[str, Ready[R]]:
        return {
            plan.name: Ready(CompiledService(plan, definitions), self._reader_of(plan, definitions), definitions.digest)
            for plan in definitions.services
        }

    def service(self, name: str, digest: str = "") -> Ready[R]:
        """The service called `name`, of the definitions with the hash `digest` when one is given.

        Raises:
            UnavailableError: no definitions are ready yet.
            FailedPreconditionError: those definitions are not served.
            NotFoundError: the definitions hold no such service.
        """
        if self._services is None:
            raise UnavailableError("DEFINITIONS_NOT_READY", "no definitions are applied, or their backfill is running")
        services = self._kept.get(digest) if digest else self._services
        if services is None:
            message = f"definitions {digest} are neither in force nor pinned; PinDefinitions has them served"
            raise FailedPreconditionError("DEFINITIONS_NOT_SERVED", message, {"definitions_hash": digest})
        service = services.get(name)
        if service is None:
            raise NotFoundError("feature service", name)
        return service

    async def read(self, service: CompiledService, rows: Sequence[Entity], at_us: int) -> Vectors:
        """One vector per row, as the store knows it.

        Raises:
            FailedPreconditionError, UnavailableError: see `fetched`.
        """
        return (await self.read_aged(service, rows, at_us, may_be_kept=False))[0]

    async def read_aged(
        self, service: CompiledService, rows: Sequence[Entity], at_us: int, *, may_be_kept: bool, by_view: bool = False
    ) -> tuple[Vectors, int, ViewAges | None]:
        """What was read, and how old it is.

        Returns:
            One vector per row; age in milliseconds of the oldest kept answer used, 0 where all came from the store; with `by_view` how
            old each row's values are.

        Raises:
            FailedPreconditionError, UnavailableError: see `fetched`.
        """
        asks, known, age_ms = await self.fetched(service, rows, at_us, may_be_kept=may_be_kept)
        make = partial(service.aged_vectors, by_view=by_view)
        if len(rows) <= service.rows_on_loop:
            vectors, by_view_ms = make(asks, known, rows, at_us)
        else:
            vectors, by_view_ms = await asyncio.to_thread(make, asks, known, rows, at_us)
        if not age_ms:  # what was kept may lawfully differ from the lake
            self.note(service, rows, at_us, partial(_values, vectors))
        return vectors, age_ms, by_view_ms

    def note(
        self, service: CompiledService, rows: Sequence[Entity], at_us: int, values_of: Callable[[int], Sequence[float]]
    ) -> None:
        """Tell who watches what is answered; `read` does so itself."""
        if self._observe is not None:
            self._observe(service, rows, at_us, values_of)

    async def fetched(
        self, service: CompiledService, rows: Sequence[Entity], at_us: int, *, may_be_kept: bool
    ) -> tuple[Sequence[Ask], Answers, int]:
        """What `service.parts` and `service.vectors` need for the rows, which take no more waiting, and how old its oldest kept part is.

        Args:
            service: what is read.
            rows: for whom.
            at_us: instant of the read.
            may_be_kept: whether kept answers will do: only for reads of this instant.

        Raises:
            FailedPreconditionError: `at_us` lies further behind a contract's watermark than history is kept.
            UnavailableError: the store does not answer.
        """
        asks = service.asks(rows, at_us)
        known, age_ms = await self._known(service, asks, may_be_kept=may_be_kept)
        for contract in service.contracts:
            progress = known.followed.get(contract)
            if progress is None or progress.watermark_us is None:
                continue
            is_fresh = contract in service.fresh_contracts
            behind_us = min(self._read_behind_us, self._head_behind_us) if is_fresh else self._read_behind_us
            oldest_us = progress.watermark_us - behind_us
            if at_us < oldest_us:
                limit = "head_behind_s" if behind_us < self._read_behind_us else "read_behind_s"
                message = f"event_time lies further behind the newest {contract} record than {limit} allows"
                raise FailedPreconditionError(
                    "EVENT_TIME_TOO_OLD", message, {"contract": contract, "oldest_us": str(oldest_us)}
                )
        return asks, known, age_ms

    async def _known(self, service: CompiledService, asks: Sequence[Ask], *, may_be_kept: bool) -> tuple[Answers, int]:
        cache = self._cache
        if may_be_kept and cache is not None and cache.covers(service.views):
            return await cache.fetch(asks, service.contracts)
        return await self.store.fetch(asks, service.contracts), 0
