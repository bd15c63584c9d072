"""Reads a source's topics and lands them.

Batches go through the lane of the contract like a producer's: several may be under way, in order. Each says after which offset it comes, so
that nothing lands twice or is left out even where two processes read for a moment. Whatever fails, the reader is closed and everything
starts again from what landed.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from millrace_kit.errors import FailedPreconditionError, UnavailableError

from millrace_ingestion import metrics
from millrace_ingestion.contracts import Contract
from millrace_ingestion.models import Incoming, Outcome
from millrace_ingestion.sources.decoding import Decoder, Message, Parse
from millrace_ingestion.sources.registry import Registry
from millrace_ingestion.sources.specs import PartitionState, Progress, Source, TopicSpec
from millrace_ingestion.sources.store import SourceStore
from millrace_ingestion.sources.topic_reader import Edge, Place, TopicReader

log = logging.getLogger(__name__)

# What one message costs in a batch beside its value, for sizes.
_ENVELOPE_BYTES = 1


class Lanes(Protocol):
    """What is used of the ingestor."""

    def contract(self, name: str) -> Contract:
        """The newest version of a contract."""
        ...

    def epoch(self, name: str) -> int:
        """The epoch of a contract's lane."""
        ...

    async def accept(self, incoming: Incoming, *, epoch: int | None = None) -> asyncio.Future[Outcome]:
        """Check and queue a batch, and wait for room."""
        ...

    async def position(self, contract: str, source: str) -> int:
        """Offset of the last batch of a source that landed; 0 for none."""
        ...


@dataclass(frozen=True)
class TopicLimits:
    """See the settings of the same names."""

    batch_bytes: int
    window: int
    release_s: float
    """Longest wait for batches under way when a partition goes to somebody else."""


@dataclass(frozen=True)
class _Sent:
    """Batches of one read that are not answered yet."""

    batches: Sequence[tuple[Place, int, asyncio.Future[Outcome]]]


class TopicSource:
    """One source while it is read, from one connection to its end.

    Args:
        source: what is read.
        lanes: where it lands.
        store: where reading began.
        make_reader: makes the reader from `begin` and `release`.
        parse: reads values that are no JSON.
        registry: what `parse` asks; closed at the end.
        progress: what is told about it.
        limits: sizes.
    """

    def __init__(
        self,
        source: Source,
        *,
        lanes: Lanes,
        store: SourceStore,
        make_reader: Callable[
            [Callable[[Mapping[Place, Edge]], Mapping[Place, int]], Callable[[Sequence[Place]], None]], TopicReader
        ],
        parse: Parse | None,
        registry: Registry | None,
        progress: Progress,
        limits: TopicLimits,
    ) -> None:
        spec = source.spec
        assert isinstance(spec, TopicSpec)
        self._source = source
        self._spec = spec
        self._lanes = lanes
        self._store = store
        self._parse = parse
        self._registry = registry
        self._progress = progress
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._reader = make_reader(self._begin, self._release)
        self._decoder: tuple[Contract, Decoder] | None = None
        self._sent: deque[_Sent] = deque()
        self._last: dict[Place, int] = {}
        """Offset of the last batch of each partition of ours, landed or under way."""
        self._epoch = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Read until `stop` is set.

        Raises:
            UnavailableError: something does not answer; run a new one.
            MillraceError: only people can settle it.
        """
        self._epoch = self._lanes.epoch(self._source.contract)
        try:
            await self._reader.open()
            while not stop.is_set():
                messages = await self._reader.read()
                self._progress.trouble = ""
                await self._send(messages)
                await self._settle(self._limits.window if messages else 0)
            await self._settle(0)
        finally:
            self._progress.partitions.clear()
            # What is under way lands or fails before a new attempt asks what landed.
            answers = [answer for sent in self._sent for _place, _position, answer in sent.batches]
            if answers:
                await asyncio.wait(answers, timeout=self._limits.release_s)
            if self._registry is not None:
                self._registry.close()
            await self._reader.close()

    async def _send(self, messages: Sequence[Message]) -> None:
        """Queue the messages, a batch for each partition (more where they are large)."""
        if not messages:
            return
        by_place: dict[Place, list[Message]] = {}
        for message in messages:
            by_place.setdefault((message.topic(), message.partition()), []).append(message)
        batches = []
        for place, found in by_place.items():
            if place not in self._last:
                continue  # it went to somebody else meanwhile
            parts = _parts(found, self._limits.batch_bytes)
            batches += [await self._send_part(place, part) for part in parts]
        self._sent.append(_Sent(batches))

    async def _send_part(self, place: Place, part: Sequence[Message]) -> tuple[Place, int, asyncio.Future[Outcome]]:
        decoded = await asyncio.to_thread(self._current_decoder().decode, part)
        position = part[-1].offset() + 1
        incoming = Incoming(
            self._source.contract,
            self._source.lane(f"{place[0]}-{place[1]}"),
            position,
            json_lines=decoded.json_lines,
            origins=decoded.origins,
            undecodable=decoded.undecodable,
            after=self._last[place],
        )
        answer = await self._lanes.accept(incoming, epoch=self._epoch)
        self._last[place] = position
        return place, position, answer

    def _current_decoder(self) -> Decoder:
        """The decoder of the contract's newest version."""
        contract = self._lanes.contract(self._source.contract)
        if self._decoder is None or self._decoder[0] is not contract:
            made = Decoder(self._source, contract, self._parse, max_bytes=self._limits.batch_bytes)
            self._decoder = (contract, made)
        return self._decoder[1]

    async def _settle(self, unanswered: int) -> None:
        """Wait until at most so many reads are unanswered; tell lag tools how far everything landed."""
        landed: dict[Place, int] = {}
        while self._sent and (len(self._sent) > unanswered or _all_done(self._sent[0])):
            sent = self._sent[0]
            for place, position, answer in sent.batches:
                self._count(await answer)
                landed[place] = position
            self._sent.popleft()
        if landed:
            await self._reader.commit(landed)
        known = self._progress.partitions
        ends = await self._reader.ends(list(known))
        for place, state in list(known.items()):
            position = landed.get(place, state.position)
            known[place] = PartitionState(*place, position, max(ends.get(place, 0), state.end, position))
        metrics.SOURCE_LAG.labels(self._source.name).set(self._progress.lag)

    def _count(self, outcome: Outcome) -> None:
        self._progress.count(outcome)
        metrics.count_source(self._source.name, outcome.accepted, outcome.duplicates, outcome.rejected)

    def _from_loop(self, work: Awaitable[Mapping[Place, int]]) -> Mapping[Place, int]:
        """Run `work` in the event loop, from the reader's thread."""

        async def run() -> Mapping[Place, int]:
            async with asyncio.timeout(self._limits.release_s):
                return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def _begin(self, edges: Mapping[Place, Edge]) -> Mapping[Place, int]:
        try:
            return self._from_loop(self._begin_at(edges))
        except TimeoutError:
            raise UnavailableError("LANDING_SLOW", "where to begin was not known in time") from None

    async def _begin_at(self, edges: Mapping[Place, Edge]) -> Mapping[Place, int]:
        """Where to read partitions that came: after what landed, else where the source says."""
        starts = dict(await asyncio.to_thread(self._store.starts, self._source.name))
        began = {topic for topic, _partition in starts}
        found: dict[Place, int] = {}
        for place, edge in edges.items():
            lane = self._source.lane(f"{place[0]}-{place[1]}")
            landed = await self._lanes.position(self._source.contract, lane)
            position = landed or starts.get(place, -1)
            if position < 0:
                # A partition that came later has nothing that was there before the source.
                position = edge.high if self._spec.latest and place[0] not in began else edge.low
                position = await asyncio.to_thread(self._store.begin, self._source.name, *place, position)
            position = self._checked(place, position, edge, landed)
            found[place] = position
            self._last[place] = landed
            self._progress.partitions[place] = PartitionState(*place, position, edge.high)
        return found

    def _checked(self, place: Place, position: int, edge: Edge, landed: int) -> int:
        if position > edge.high:
            raise FailedPreconditionError(
                "TOPIC_REPLACED",
                f"{place[0]}-{place[1]} ends at {edge.high}, and {position} was read: it is another topic; register it under another name",
                {"topic": place[0], "partition": str(place[1]), "end": str(edge.high), "position": str(position)},
            )
        if position < edge.low and landed and not self._spec.skip_lost:
            raise FailedPreconditionError(
                "MESSAGES_LOST",
                f"{place[0]}-{place[1]} lost the messages {position} to {edge.low - 1} before they were read; skip_lost goes on without them",
                {"topic": place[0], "partition": str(place[1]), "from": str(position), "to": str(edge.low - 1)},
            )
        return max(position, edge.low)

    def _release(self, places: Sequence[Place]) -> None:
        """Batches under way land before somebody else gets their partition."""

        async def settle() -> Mapping[Place, int]:
            answers = [
                answer for sent in self._sent for place, _position, answer in sent.batches if place in set(places)
            ]
            await asyncio.wait(answers) if answers else None
            for place in places:
                self._last.pop(place, None)
                self._progress.partitions.pop(place, None)
            return {}

        try:
            self._from_loop(settle())
        except TimeoutError:
            raise UnavailableError("LANDING_SLOW", "batches under way did not land in time") from None


def _all_done(sent: _Sent) -> bool:
    return all(answer.done() for _place, _position, answer in sent.batches)


def _parts(messages: Sequence[Message], limit: int) -> list[Sequence[Message]]:
    """`messages` cut where more would be larger than `limit`; a larger message is alone."""
    parts: list[Sequence[Message]] = []
    start = size = 0
    for index, message in enumerate(messages):
        length = len(message.value() or b"") + _ENVELOPE_BYTES
        if index > start and size + length > limit:
            parts.append(messages[start:index])
            start, size = index, 0
        size += length
    parts.append(messages[start:])
    return parts
