"""The stream worker: fills new views from the lake, then follows the bus without gap or double count.

A view is filled from the newest version V of its table; afterwards a batch counts for it exactly when its table version is above V.
Batches carry the version that holds them, so it does not matter which were published before, during or after the fill.

Over a shared store the replicas' workers split the partitions between them, and one at a time fills. What one of them is told by the
store to have missed (`StoreMovedError`) makes it read definitions, groups and positions again; nothing of its change was kept then.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from millrace_kit.bus import Bus, Message, Subscription, TopicPartition, records_topic
from millrace_kit.clock import Clock
from millrace_kit.errors import MillraceError, UnavailableError
from millrace_kit.telemetry import consumer_span

from millrace_feature.batches import plan_change, read_messages
from millrace_feature.freshness import note_readable
from millrace_feature.lake import NO_TABLE, Lake, Query
from millrace_feature.metrics import FILL_SECONDS, LAG, WATERMARK
from millrace_feature.plan import Definitions, LatestView, View, WindowView
from millrace_feature.serving import Serving
from millrace_feature.settings import FeatureSettings
from millrace_feature.store import Followed, OnlineStore, StoreFillingError, StoreMovedError, rows_bound_us
from millrace_feature.tiles import Tiles

log = logging.getLogger(__name__)

GROUP = "feature"
RETRY_S = 1.0
FILLING_RETRY_S = 0.1
LOOK_S = 1.0
"""Time between two looks whether a shared store still has what was opened; also between two commits to the bus."""
TIDY_S = 10.0
RESERVE_TRIES = 20
PRUNE_EVERY_US = 86_400_000_000
"""Event time between two prunings of a contract's history."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_us(instant: datetime) -> int:
    """Microseconds since the epoch."""
    return (instant - EPOCH) // timedelta(microseconds=1)


@dataclass(slots=True)
class Wanted:
    """Definitions to switch to, and who waits for it."""

    definitions: Definitions
    kept: tuple[Definitions, ...] = ()
    """Others that are followed and served too."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    followed: Definitions = field(init=False)
    """The definitions with the views of the others that keep something else."""

    def __post_init__(self) -> None:
        groups = {view.group for view in self.definitions.views}
        others = {v.group: v for kept in self.kept for v in kept.views if v.group not in groups}
        self.followed = replace(self.definitions, views=(*self.definitions.views, *others.values()))

    @property
    def digests(self) -> tuple[str, ...]:
        """Hashes of all, those to switch to first."""
        return (self.definitions.digest, *(kept.digest for kept in self.kept))


class _GapError(Exception):
    """The bus no longer has messages that were not applied yet."""

    def __init__(self, contract: str, place: TopicPartition, offset: int) -> None:
        super().__init__(f"the bus begins at offset {offset} of {place.topic}/{place.partition}")
        self.contract = contract
        self.place = place
        self.offset = offset


class StreamWorker:
    """Keeps the online store in step with the records topics of the current definitions.

    Args:
        store: the online store.
        lake: where new groups are filled from.
        bus: where records come from.
        serving: told which definitions can be answered with.
        settings: limits and waits.
        clock: wall clock.
        current: hashes of the definitions in force and of those that are kept, whichever replica applied them.
    """

    def __init__(
        self,
        *,
        store: OnlineStore,
        lake: Lake,
        bus: Bus,
        serving: Serving[Any],
        settings: FeatureSettings,
        clock: Clock,
        current: Callable[[], Sequence[str]],
    ) -> None:
        self._store = store
        self._lake = lake
        self._bus = bus
        self._serving = serving
        self._settings = settings
        self._clock = clock
        self._current = current
        self._wanted: Wanted | None = None
        self._definitions: Definitions | None = None
        self._subscription: Subscription | None = None
        self._cuts: dict[str, int] = {}
        self._followed: dict[str, Followed] = {}
        self._positions: dict[TopicPartition, int] = {}
        self._pruned_us: dict[str, int] = {}
        self._mine: dict[TopicPartition, int] = {}
        self._gaps: dict[TopicPartition, int] = {}
        self._is_lost = False
        self._next_look = 0.0
        self._next_tidy = 0.0

    def switch(self, definitions: Definitions, kept: Sequence[Definitions] = ()) -> asyncio.Event:
        """Ask for `definitions`, and for `kept` to be served beside them.

        The event is set once reads are answered with them, or once others are asked for.
        """
        if self._wanted is not None:
            self._wanted.done.set()
        self._wanted = Wanted(definitions, tuple(kept))
        return self._wanted.done

    @property
    def wanted_digests(self) -> tuple[str, ...]:
        """Hashes of the definitions asked for last, those in force first; empty before any were."""
        return self._wanted.digests if self._wanted is not None else ()

    @property
    def is_following(self) -> bool:
        """Whether reads can be answered; true when no definitions are asked for."""
        return self._wanted is None or (self._serving.is_active and not self._is_lost)

    @property
    def contracts(self) -> Sequence[str]:
        """Contracts the current definitions follow, sorted."""
        return sorted({view.contract for view in self._definitions.views}) if self._definitions else []

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the bus until `stop` is set."""
        try:
            while not stop.is_set():
                try:
                    await self._turn(stop)
                except UnavailableError as error:
                    log.warning("%s; trying again in %g s", error.message, RETRY_S)
                    await self._close()
                    await _pause(stop, RETRY_S)
                except StoreMovedError as error:
                    log.info("the online store was changed by another replica (%s); looking again", error)
                    await self._start_over()
                except _GapError as error:
                    log.warning("%s: records are missing there, contract %s is filled anew", error, error.contract)
                    await asyncio.to_thread(self._forget, error)
                    await self._start_over()
        finally:
            await self._close()

    async def _start_over(self) -> None:
        """Follow the wanted definitions again; reads go on being answered where their groups stand."""
        self._definitions = None
        self._positions = {}
        await self._close()

    async def _turn(self, stop: asyncio.Event) -> None:
        wanted = self._wanted
        if wanted is not None and wanted.followed is not self._definitions:
            try:
                await self._follow(wanted)
            except MillraceError as error:
                if isinstance(error, UnavailableError):
                    raise
                # For example a column the table does not have yet; the definitions before stay in force.
                log.error("definitions %s cannot be served yet: %s", wanted.definitions.digest, error.message)  # noqa: TRY400
                await _pause(stop, RETRY_S)
            else:
                wanted.done.set()
        if self._definitions is None:
            await _pause(stop, self._settings.fetch_wait_s)
            return
        await self._look()
        if self._subscription is None:
            self._subscription = await self._subscribe([records_topic(contract) for contract in self.contracts])
        messages = await self._subscription.fetch(
            max_messages=self._settings.fetch_messages, timeout_s=self._settings.fetch_wait_s
        )
        if messages:
            with consumer_span("apply records", messages[0].headers):
                await self._apply_once_filled(messages, self._definitions, stop)

    async def _subscribe(self, topics: Sequence[str]) -> Subscription:
        if self._store.is_shared:
            return await self._bus.subscribe(topics, group=GROUP, starts=self._starts)
        at = await asyncio.to_thread(self._starts, ())
        return await self._bus.subscribe(topics, group=GROUP, at={p: o for p, o in at.items() if p.topic in topics})

    def _starts(self, _places: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Positions of the partitions that just came to this replica, as the store has them."""
        self._positions = dict(self._store.positions())
        self._followed = dict(self._store.followed())
        return self._positions

    async def _look(self) -> None:
        """Notice what others did to a shared store, also while no record comes."""
        now = time.monotonic()
        if now < self._next_look or not self._store.is_shared:
            return
        self._next_look = now + LOOK_S
        if not await asyncio.to_thread(self._store.is_intact):
            self._is_lost = True
            raise StoreMovedError("groups are gone")
        stored = await asyncio.to_thread(self._store.positions)
        if any(stored.get(place, 0) < offset for place, offset in self._positions.items()):
            raise StoreMovedError("the store has gone back to an earlier state")
        if now >= self._next_tidy:
            self._next_tidy = now + TIDY_S
            await asyncio.to_thread(self._store.tidy)
        if self._subscription is not None and self._positions:
            topics = {records_topic(contract) for contract in self.contracts}
            await self._note_positions({p: o for p, o in self._mine.items() if p.topic in topics})

    async def _note_positions(self, positions: Mapping[TopicPartition, int]) -> None:
        """Tell the bus too, for those who watch or scale by the group's lag; nobody reads from there."""
        assert self._subscription is not None
        if not positions:
            return
        try:
            await self._subscription.commit(positions)
        except UnavailableError as error:
            log.info("the bus did not take the group's positions: %s", error.message)
        self._mine.clear()

    async def _apply_once_filled(
        self, messages: Sequence[Message], definitions: Definitions, stop: asyncio.Event
    ) -> None:
        while not stop.is_set():
            try:
                await asyncio.to_thread(self._apply, messages, definitions)
            except StoreFillingError:
                await _pause(stop, FILLING_RETRY_S)
            else:
                return

    async def _follow(self, wanted: Wanted) -> None:
        """Fill what is new, answer with what is wanted, forget what that no longer names."""
        groups = {view.group: view for view in wanted.followed.views}
        await asyncio.to_thread(self._fill_missing, wanted, groups)
        self._cuts = dict(await asyncio.to_thread(self._store.groups))
        if not self._cuts.keys() >= groups.keys():
            raise StoreMovedError("groups went while they were followed")
        self._followed = dict(await asyncio.to_thread(self._store.followed))
        await asyncio.to_thread(self._serving.activate, wanted.definitions, wanted.kept)
        self._definitions = wanted.followed
        self._is_lost = False
        await self._close()

    def _fill_missing(self, wanted: Wanted, groups: Mapping[str, View]) -> None:
        with self._store.exclusive():
            if self._store.is_shared and tuple(self._current()) != wanted.digests:
                raise UnavailableError("DEFINITIONS_OUTDATED", "other definitions were applied meanwhile")
            filled = dict(self._store.groups())
            known = {view.contract for view in groups.values() if view.group in filled}
            try:
                for group, view in groups.items():
                    if group not in filled:
                        self._fill(view, first=view.contract not in known)
                        known.add(view.contract)
            except Exception:
                # What was filled would miss the records that follow; it is filled again at the next try.
                with contextlib.suppress(UnavailableError):
                    self._store.keep(filled)
                raise
            self._store.open(list(groups.values()))
            self._store.keep(list(groups))

    def _fill(self, view: View, *, first: bool) -> None:
        """Fill one view's group from the lake; `first` when nothing of its contract is followed yet."""
        started = time.perf_counter()
        version = self._reserved_version(view)
        followed = Followed(0, None, version) if first else None
        if version == NO_TABLE:
            self._store.fill(view, [], version=version, followed=followed)
        else:
            with self._lake.query({view.contract: version}) as query:
                rows, watermark_us = query.stats(view.contract, view.event_time, until_us=self._until_us())
                if first:
                    followed = Followed(rows, watermark_us, version)
                since_us = self._oldest_us(view, watermark_us)
                head_us = self._head_before_us(watermark_us) if watermark_us is not None else None
                content = (
                    tiles_to_fill(query, view, since_us, head_us)
                    if isinstance(view, WindowView)
                    else query.rows(view, since_us)
                )
                self._store.fill(view, content, version=version, followed=followed)
            log.info("view %s is filled from %s@%d (%d rows)", view.name, view.contract, version, rows)
        FILL_SECONDS.observe(time.perf_counter() - started)

    def _head_before_us(self, watermark_us: int) -> int:
        behind_s = min(self._settings.head_behind_s, self._settings.read_behind_s)
        return watermark_us - behind_s * 1_000_000

    def _reserved_version(self, view: View) -> int:
        """The table's newest version, with the store told that the view will be filled from it."""
        for _try in range(RESERVE_TRIES):
            version = self._lake.newest_version(view.contract)
            if self._store.reserve(view, version):
                return version
        raise UnavailableError("TABLE_MOVES", f"table {view.contract!r} gets batches faster than it can be looked at")

    def _forget(self, gap: _GapError) -> None:
        """Have the contract's groups filled anew; the lake has what the bus lost."""
        assert self._definitions is not None
        with self._store.exclusive():
            kept = [view.group for view in self._definitions.views if view.contract != gap.contract]
            self._store.keep(kept)
        self._gaps[gap.place] = gap.offset

    def _until_us(self) -> int:
        return to_us(self._clock.now()) + self._settings.max_event_ahead_s * 1_000_000

    def _oldest_us(self, view: View, watermark_us: int | None) -> int | None:
        """The oldest event time a read may need; None when all may be."""
        if watermark_us is None or (isinstance(view, LatestView) and not view.ttl_us):
            return None
        before_us = watermark_us - self._settings.read_behind_s * 1_000_000
        if isinstance(view, LatestView):
            return rows_bound_us(view, before_us)
        return (before_us - view.reach_us) // view.hop_us * view.hop_us

    def _apply(self, messages: Sequence[Message], definitions: Definitions) -> None:
        self._check_gaps(messages)
        reading = read_messages(messages, self._store.seen)
        change = plan_change(reading, definitions, cuts=self._cuts, followed=self._followed, until_us=self._until_us())
        self._store.apply(replace(change, starts={p: self._positions.get(p, 0) for p in change.positions}))
        self._positions.update(change.positions)
        self._mine.update(change.positions)
        self._followed.update(change.followed)
        note_readable(messages, reading.batches, definitions)
        for contract, followed in change.followed.items():
            if followed.watermark_us is not None:
                WATERMARK.labels(contract).set(followed.watermark_us / 1e6)
                self._prune(contract, followed.watermark_us, definitions)

    def _check_gaps(self, messages: Sequence[Message]) -> None:
        """Offsets of a partition follow each other; where the first one read jumps, the bus has dropped what was not applied."""
        first: dict[TopicPartition, Message] = {}
        for message in messages:
            first.setdefault(message.place, message)
        for place, message in first.items():
            expected = self._positions.get(place, 0)
            if expected < message.offset and place in self._positions and message.offset > self._gaps.get(place, 0):
                raise _GapError(message.topic.removeprefix(records_topic("")), place, message.offset)

    def _prune(self, contract: str, watermark_us: int, definitions: Definitions) -> None:
        last_us = self._pruned_us.setdefault(contract, watermark_us)
        if watermark_us - last_us < PRUNE_EVERY_US:
            return
        self._pruned_us[contract] = watermark_us
        before_us = watermark_us - self._settings.read_behind_s * 1_000_000
        for view in {view.group: view for view in definitions.views if view.contract == contract}.values():
            self._store.prune(view, before_us, self._head_before_us(watermark_us))

    def note_lag(self, ends: Mapping[TopicPartition, int], positions: Mapping[TopicPartition, int]) -> None:
        """Export how many messages wait, from the topics' ends."""
        for place, end in ends.items():
            LAG.labels(place.topic.removeprefix(records_topic(""))).set(max(0, end - positions.get(place, 0)))

    async def _close(self) -> None:
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await subscription.close()


def tiles_to_fill(query: Query, view: WindowView, since_us: int | None, head_us: int | None) -> list[Tiles]:
    """The view's tiles: of whole hops, and finer ones from `head_us` on where a fresh head may be asked for."""
    if not view.head_us or head_us is None:
        return [query.tiles(view, since_us, None, view.hop_us)]
    edge_us = head_us // view.hop_us * view.hop_us
    return [query.tiles(view, since_us, edge_us, view.hop_us), query.tiles(view, edge_us, None)]


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
