"""Keeps the vector indexes of a process up: filled from the online store, then told by the bus which entities changed.

Only the names of changed entities are taken from messages; their rows are read from the store once it has applied those messages. So the
index says what the store says, whichever replica wrote it, and the rules of what counts live in one place. Every replica follows all
partitions of the contracts whose views have a `vector_index`; how long ago it was level with them is part of every answer.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from google.protobuf.message import DecodeError
from millrace_kit.bus import Bus, Message, Subscription, TopicPartition, records_topic
from millrace_kit.clock import Clock
from millrace_kit.errors import UnavailableError

from millrace_feature.batches import decode_message
from millrace_feature.plan import Definitions, LatestView, VectorField
from millrace_feature.search.index import IndexFullError, Memory, VectorIndex
from millrace_feature.search.metrics import INDEX_AGE, INDEX_ROWS
from millrace_feature.serving import Serving
from millrace_feature.settings import VectorSearchSettings
from millrace_feature.store import LatestAsk
from millrace_feature.tiles import encode_key
from millrace_feature.worker import to_us

log = logging.getLogger(__name__)

GROUP = "feature-vectors"
READ_ROWS = 1_000
"""Entities read from the store at once."""
FETCH_MESSAGES = 64
RETRY_S = 1.0
SETTLE_S = 0.05
"""How often the store is asked whether it has applied what the bus told."""
Place = tuple[str, str]
"""(group, feature)."""


class _Followed:
    """One embedding: its index, and whether it can be searched."""

    def __init__(self, view: LatestView, field: VectorField, memory: Memory) -> None:
        self.view = view
        self.column = view.features.index(field.feature)
        self.index = VectorIndex(field, memory)
        self.is_filled = False
        """Whether it has been read whole."""
        self.is_due = True
        """Whether it has to be read whole."""
        self.is_full = False
        """Whether it does not fit into memory."""


class IndexFollower:
    """Makes and keeps up an index for every embedding with a `vector_index` of the definitions in force.

    Args:
        serving: which definitions are in force, and the online store.
        bus: where changes are announced.
        settings: limits and waits.
        clock: wall clock and ages.
    """

    def __init__(self, *, serving: Serving[Any], bus: Bus, settings: VectorSearchSettings, clock: Clock) -> None:
        self._serving = serving
        self._bus = bus
        self._settings = settings
        self._clock = clock
        self._memory = Memory(settings.max_memory_mib * 1024 * 1024)
        self._definitions: Definitions | None = None
        self._followed: dict[Place, _Followed] = {}
        self._subscription: Subscription | None = None
        self._next: dict[TopicPartition, int] = {}
        """Next offset to read."""
        self._changed: dict[str, set[str]] = {}
        """Entities whose rows are to be read again, by group."""
        self._level_at: float | None = None
        self._rebuild_at = 0.0

    def index(self, view: LatestView, field: VectorField) -> VectorIndex | None:
        """The index of an embedding; None while it is filled.

        Raises:
            IndexFullError: it does not fit into the memory that is allowed.
        """
        found = self._followed.get((view.group, field.feature))
        if found is not None and found.is_full:
            raise IndexFullError
        return found.index if found is not None and found.is_filled else None

    def age_ms(self) -> int:
        """How long ago the indexes were level with the bus."""
        return 0 if self._level_at is None else int((self._clock.monotonic() - self._level_at) * 1000)

    async def run(self, stop: asyncio.Event) -> None:
        """Follow until `stop` is set; what does not answer is asked again."""
        try:
            while not stop.is_set():
                try:
                    await self._turn(stop)
                except UnavailableError as error:
                    log.info("vector indexes wait: %s", error.message)
                    await self._close()
                    await _pause(stop, RETRY_S)
        finally:
            await self._close()

    async def _turn(self, stop: asyncio.Event) -> None:
        definitions = self._serving.definitions
        if definitions is not None and definitions is not self._definitions:
            await self._begin(definitions)
        contracts = {followed.view.contract for followed in self._followed.values()}
        if not contracts:
            await _pause(stop, self._settings.poll_s)
            return
        await self._fill(contracts)
        if self._subscription is None:
            topics = sorted(map(records_topic, contracts))
            self._subscription = await self._bus.subscribe(topics, group=GROUP, at=self._next)
        fetched_at = self._clock.monotonic()
        messages = await self._subscription.fetch(max_messages=FETCH_MESSAGES, timeout_s=self._settings.poll_s)
        self._take(messages)
        await self._settle(stop)
        if not self._changed and len(messages) < FETCH_MESSAGES:
            self._level_at = fetched_at
        INDEX_AGE.set(self.age_ms() / 1000)

    async def _begin(self, definitions: Definitions) -> None:
        """Follow what `definitions` name; an index whose group stays is kept."""
        wanted = {
            (view.group, field.feature): (view, field)
            for view in definitions.views
            if isinstance(view, LatestView)
            for field in view.vectors
            if field.metric is not None
        }
        for place in self._followed.keys() - wanted.keys():
            self._followed.pop(place).index.release()
        for place, (view, field) in wanted.items():
            if place not in self._followed:
                self._followed[place] = _Followed(view, field, self._memory)
        self._definitions = definitions
        await self._close()

    async def _fill(self, contracts: set[str]) -> None:
        """Read whole groups where that is due: new ones, those that missed messages, and all of them from time to time."""
        now = self._clock.monotonic()
        if now >= self._rebuild_at:
            self._rebuild_at = now + self._settings.rebuild_every_s
            for followed in self._followed.values():
                followed.is_due = True
        due = [followed for followed in self._followed.values() if followed.is_due and not followed.is_full]
        if not due:
            return
        topics = {records_topic(contract) for contract in contracts}
        positions = await asyncio.to_thread(self._serving.store.positions)
        # What is read twice does no harm, what is left out would.
        starts = {place: min(self._next.get(place, offset), offset) for place, offset in positions.items()}
        self._next = {place: offset for place, offset in {**self._next, **starts}.items() if place.topic in topics}
        await self._close()
        for followed in due:
            await self._fill_one(followed)

    async def _fill_one(self, followed: _Followed) -> None:
        names: set[str] = set()
        try:
            keys = await asyncio.to_thread(self._serving.store.keys, followed.view.group)
            for start in range(0, len(keys), READ_ROWS):
                part = keys[start : start + READ_ROWS]
                names.update(part)
                await self._read(followed, part)
        except IndexFullError:
            self._give_up(followed)
            return
        await asyncio.to_thread(followed.index.keep, names)
        followed.is_filled, followed.is_due = True, False
        INDEX_ROWS.labels(followed.view.name).set(followed.index.rows)
        log.info("the vectors of view %s are indexed (%d rows)", followed.view.name, followed.index.rows)

    def _give_up(self, followed: _Followed) -> None:
        log.error(
            "the vectors of view %s do not fit into vector_search.max_memory_mib (%d MiB); they cannot be searched",
            followed.view.name,
            self._settings.max_memory_mib,
        )
        followed.is_full = True
        followed.index.release()

    async def _read(self, followed: _Followed, keys: Sequence[str]) -> None:
        view = followed.view
        ask = LatestAsk(view.group, keys, to_us(self._clock.now()), len(view.features))
        known = await self._serving.store.fetch([ask], [])
        try:
            rows = known.latest(ask)
        except KeyError:  # other definitions came into force meanwhile
            raise UnavailableError("ONLINE_STORE_REBUILDING", f"view {view.name} is made anew") from None
        await asyncio.to_thread(followed.index.put, keys, rows, followed.column)

    def _take(self, messages: Sequence[Message]) -> None:
        """Note which entities the messages are about."""
        for message in messages:
            contract = message.topic.removeprefix(records_topic(""))
            expected = self._next.get(message.place, message.offset)
            self._next[message.place] = message.offset + 1
            views = [f for f in self._followed.values() if f.view.contract == contract]
            if message.offset > expected:
                gap = "the bus lacks messages before offset %d of %s: its vectors are indexed anew"
                log.warning(gap, message.offset, message.topic)
                for followed in views:
                    followed.is_due = True
            try:
                _record, table = decode_message(message, contract)
            except (DecodeError, ValueError, pa.ArrowException, OSError):
                continue  # the stream worker counts and passes over it too
            for followed in views:
                self._changed.setdefault(followed.view.group, set()).update(_entities(followed.view, table))

    async def _settle(self, stop: asyncio.Event) -> None:
        """Read the changed entities again, once the store has applied what named them."""
        if not self._changed:
            return
        while not stop.is_set():
            positions: Mapping[TopicPartition, int] = await asyncio.to_thread(self._serving.store.positions)
            if all(positions.get(place, 0) >= offset for place, offset in self._next.items()):
                break
            if self._serving.definitions is not self._definitions:
                return
            await _pause(stop, SETTLE_S)
        else:
            return
        for group, names in list(self._changed.items()):
            keys = sorted(names)
            for followed in [f for f in self._followed.values() if f.view.group == group and f.is_filled]:
                try:
                    for start in range(0, len(keys), READ_ROWS):
                        await self._read(followed, keys[start : start + READ_ROWS])
                except IndexFullError:
                    self._give_up(followed)
                INDEX_ROWS.labels(followed.view.name).set(followed.index.rows)
            del self._changed[group]

    async def _close(self) -> None:
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await subscription.close()


def _entities(view: LatestView, table: pa.Table) -> set[str]:
    """Encoded keys of the records' entities."""
    if any(key not in table.column_names for key in view.join_keys):
        return set()
    columns = [table.column(key) for key in view.join_keys]
    wanted = columns[0].is_valid()
    for column in columns[1:]:
        wanted = pc.and_(wanted, column.is_valid())
    values = [column.filter(wanted).to_pylist() for column in columns]
    return {encode_key(key) for key in zip(*values, strict=True)}


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
