"""The stream worker: fills new views from the lake, then follows the bus without gap or double count.

A view is filled from the newest version V of its table; afterwards a batch counts for it exactly when its table version is above V.
Batches carry the version that holds them, so it does not matter which were published before, during or after the fill.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
from millrace_kit.bus import Bus, Message, Subscription, TopicPartition, records_topic
from millrace_kit.clock import Clock
from millrace_kit.errors import MillraceError, UnavailableError
from millrace_kit.telemetry import consumer_span

from millrace_feature.batches import plan_change, read_messages
from millrace_feature.lake import NO_TABLE, Lake
from millrace_feature.metrics import FILL_SECONDS, FRESHNESS, LAG, WATERMARK
from millrace_feature.plan import Definitions, LatestView, View, WindowView
from millrace_feature.rows import Row
from millrace_feature.serving import Serving
from millrace_feature.settings import FeatureSettings
from millrace_feature.store import Followed, OnlineStore, rows_bound_us
from millrace_feature.tiles import Tiles, reduce_rows

log = logging.getLogger(__name__)

GROUP = "feature"
RETRY_S = 1.0
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
    done: asyncio.Event = field(default_factory=asyncio.Event)


class StreamWorker:
    """Keeps the online store in step with the records topics of the current definitions."""

    def __init__(
        self,
        *,
        store: OnlineStore,
        lake: Lake,
        bus: Bus,
        serving: Serving[Any],
        settings: FeatureSettings,
        clock: Clock,
    ) -> None:
        self._store = store
        self._lake = lake
        self._bus = bus
        self._serving = serving
        self._settings = settings
        self._clock = clock
        self._wanted: Wanted | None = None
        self._definitions: Definitions | None = None
        self._subscription: Subscription | None = None
        self._cuts: dict[str, int] = {}
        self._followed: dict[str, Followed] = {}
        self._positions: dict[TopicPartition, int] = {}
        self._pruned_us: dict[str, int] = {}

    def switch(self, definitions: Definitions) -> asyncio.Event:
        """Ask for `definitions`; the event is set once reads are answered with them, or once others are asked for."""
        if self._wanted is not None:
            self._wanted.done.set()
        self._wanted = Wanted(definitions)
        return self._wanted.done

    @property
    def positions(self) -> Mapping[TopicPartition, int]:
        """Next bus offset to read."""
        return dict(self._positions)

    @property
    def followed(self) -> Mapping[str, Followed]:
        """Progress by contract."""
        return dict(self._followed)

    @property
    def contracts(self) -> Sequence[str]:
        """Contracts the current definitions follow, sorted."""
        return sorted({view.contract for view in self._definitions.views}) if self._definitions else []

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the bus until `stop` is set."""
        self._followed = dict(await asyncio.to_thread(self._store.followed))
        self._positions = dict(await asyncio.to_thread(self._store.positions))
        try:
            while not stop.is_set():
                try:
                    await self._turn(stop)
                except UnavailableError as error:
                    log.warning("%s; trying again in %g s", error.message, RETRY_S)
                    await self._close()
                    await _pause(stop, RETRY_S)
        finally:
            await self._close()

    async def _turn(self, stop: asyncio.Event) -> None:
        wanted = self._wanted
        if wanted is not None and wanted.definitions is not self._definitions:
            try:
                await self._follow(wanted.definitions)
            except MillraceError as error:
                if isinstance(error, UnavailableError):
                    raise
                # For example a column the table does not have yet; the definitions before stay in force.
                # What was filled for them would miss the records that follow; it is filled again at the next try.
                kept = [view.group for view in self._definitions.views] if self._definitions else []
                await asyncio.to_thread(self._store.keep, kept)
                log.error("definitions %s cannot be served yet: %s", wanted.definitions.digest, error.message)  # noqa: TRY400
                await _pause(stop, RETRY_S)
            else:
                wanted.done.set()
        if self._definitions is None:
            await _pause(stop, self._settings.fetch_wait_s)
            return
        if self._subscription is None:
            topics = [records_topic(contract) for contract in self.contracts]
            at = {place: offset for place, offset in self._positions.items() if place.topic in topics}
            self._subscription = await self._bus.subscribe(topics, group=GROUP, at=at)
        messages = await self._subscription.fetch(
            max_messages=self._settings.fetch_messages, timeout_s=self._settings.fetch_wait_s
        )
        if messages:
            with consumer_span("apply records", messages[0].headers):
                await asyncio.to_thread(self._apply, messages, self._definitions)

    async def _follow(self, definitions: Definitions) -> None:
        """Fill what is new, answer with `definitions`, forget what they no longer name."""
        groups = {view.group: view for view in definitions.views}
        filled = dict(await asyncio.to_thread(self._store.groups))
        known = {view.contract for view in groups.values() if view.group in filled}
        for group, view in groups.items():
            if group not in filled:
                await asyncio.to_thread(self._fill, view, first=view.contract not in known)
                known.add(view.contract)
        await asyncio.to_thread(self._store.open, list(groups.values()))
        self._cuts = dict(await asyncio.to_thread(self._store.groups))
        self._serving.followed = dict(self._followed)
        await asyncio.to_thread(self._serving.activate, definitions)
        self._definitions = definitions
        await asyncio.to_thread(self._store.keep, list(groups))
        await self._close()

    def _fill(self, view: View, *, first: bool) -> None:
        """Fill one view's group from the lake; `first` when nothing of its contract is followed yet."""
        started = time.perf_counter()
        version = self._lake.newest_version(view.contract)
        followed = Followed(0, None, version) if first else self._followed.get(view.contract)
        if version == NO_TABLE:
            empty = _empty(view)
            self._store.fill(view, empty, version=version, followed=followed if first else None)
        else:
            with self._lake.query({view.contract: version}) as query:
                rows, watermark_us = query.stats(view.contract, view.event_time, until_us=self._until_us())
                if first:
                    followed = Followed(rows, watermark_us, version)
                since_us = self._oldest_us(view, watermark_us)
                content = (
                    query.tiles(view, since_us, None) if isinstance(view, WindowView) else query.rows(view, since_us)
                )
                self._store.fill(view, content, version=version, followed=followed if first else None)
            log.info("view %s is filled from %s@%d (%d rows)", view.name, view.contract, version, rows)
        if followed is not None:
            self._followed[view.contract] = followed
        FILL_SECONDS.observe(time.perf_counter() - started)

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
        reading = read_messages(messages, self._store.is_seen)
        change = plan_change(reading, definitions, cuts=self._cuts, followed=self._followed, until_us=self._until_us())
        self._store.apply(change)
        self._positions.update(change.positions)
        self._followed.update(change.followed)
        self._serving.followed = dict(self._followed)
        now_ms = time.time_ns() // 1_000_000
        for message in messages:
            FRESHNESS.observe(max(0, now_ms - message.timestamp_ms) / 1000)
        for contract, followed in change.followed.items():
            if followed.watermark_us is not None:
                WATERMARK.labels(contract).set(followed.watermark_us / 1e6)
                self._prune(contract, followed.watermark_us, definitions)

    def _prune(self, contract: str, watermark_us: int, definitions: Definitions) -> None:
        last_us = self._pruned_us.setdefault(contract, watermark_us)
        if watermark_us - last_us < PRUNE_EVERY_US:
            return
        self._pruned_us[contract] = watermark_us
        before_us = watermark_us - self._settings.read_behind_s * 1_000_000
        for view in {view.group: view for view in definitions.views if view.contract == contract}.values():
            self._store.prune(view, before_us)

    def note_lag(self, ends: Mapping[TopicPartition, int]) -> None:
        """Export how many messages wait, from the topics' ends."""
        for place, end in ends.items():
            LAG.labels(place.topic.removeprefix(records_topic(""))).set(max(0, end - self._positions.get(place, 0)))

    async def _close(self) -> None:
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await subscription.close()


def _empty(view: View) -> Tiles | list[Row]:
    if isinstance(view, LatestView):
        return []
    names = [view.event_time, *view.join_keys, *view.columns]
    table = pa.table({name: pa.nulls(0) for name in dict.fromkeys(names)})
    return reduce_rows(table, keys=view.join_keys, event_time=view.event_time, columns=view.columns, hop_us=view.hop_us)


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
