"""Online reads from Redis: everything a request needs in one pipelined round trip, then the arithmetic the embedded store does.

Each round trip also asks whether the groups are still the ones that were opened, so a Redis that lost its data, or a group that another
replica made anew, is noticed by the read itself and never answered as "no values".
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millrace_kit.errors import UnavailableError
from redis.exceptions import RedisError

from millrace_feature.index import TileSeries
from millrace_feature.redis_calls import unavailable
from millrace_feature.redis_layout import CHUNK_HOPS, Group, Keys, Progress, Run, joined_runs, unpack_row
from millrace_feature.store import Ask, Followed, LatestAsk, NewestRow, WindowAsk


def rebuilding(group: str) -> UnavailableError:
    """Values of `group` are not there."""
    message = "the online store's values are being made anew; try again"
    return UnavailableError("ONLINE_STORE_REBUILDING", message, {"group": group})


@dataclass(frozen=True, slots=True)
class RedisAnswers:
    """`Answers` from what one round trip brought."""

    followed: Mapping[str, Followed]
    opened: Mapping[str, Group]
    found: Mapping[tuple[str, str], Any]
    """Replies by (group, entity)."""

    def windows(self, ask: WindowAsk) -> list[list[float]]:
        """Window features per key."""
        columns = self.opened[ask.group].columns
        return [self._window(ask, key, columns) if key is not None else ask.reader.missing for key in ask.keys]

    def _window(self, ask: WindowAsk, key: str, columns: int) -> list[float]:
        runs = [Run.unpack(packed, columns) for packed in self.found[ask.group, key] if packed is not None]
        if not runs:
            return ask.reader.empty
        joined = joined_runs(runs, columns)
        return TileSeries.of(joined.hops, joined.stats).read(ask.reader, ask.end_hop)

    def latest(self, ask: LatestAsk) -> list[NewestRow | None]:
        """Newest row per key."""
        replies = [self.found[ask.group, key] if key is not None else () for key in ask.keys]
        return [unpack_row(reply[0]) if reply else None for reply in replies]


def chunks_of(ask: WindowAsk) -> range:
    """Numbers of the hash fields that the widest window touches."""
    first = ask.end_hop + int(ask.reader.bounds[0])
    return range(first // CHUNK_HOPS, (ask.end_hop - 1) // CHUNK_HOPS + 1)


class RedisReader:
    """Fetches what requests ask for.

    Args:
        client: an asyncio client; its connections are shared by all requests.
        keys: names of keys.
        timeout_s: longest wait of a request, a free connection included.
    """

    def __init__(self, client: Any, keys: Keys, timeout_s: float) -> None:
        self._client = client
        self._keys = keys
        self._timeout_s = timeout_s

    async def fetch(
        self, asks: Sequence[Ask], contracts: Sequence[str], opened: Mapping[str, Group | None]
    ) -> RedisAnswers:
        """See `OnlineStore.fetch`."""
        groups: dict[str, Group] = {}
        for ask in asks:
            group = opened.get(ask.group)
            if group is None:
                raise rebuilding(ask.group)
            groups[ask.group] = group
        pipe = self._client.pipeline(transaction=False)
        names = list(groups)
        pipe.hmget(self._keys.groups, names or [""])
        pipe.hmget(self._keys.followed, list(contracts) or [""])
        places = self._add(pipe, asks, groups)
        try:
            async with asyncio.timeout(self._timeout_s):
                standing, progress, *replies = await pipe.execute()
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise unavailable(error) from error
        for name, entry in zip(names, standing, strict=False):
            if entry is None or entry.partition(b" ")[0].decode() != groups[name].id:
                raise rebuilding(name)
        known = zip(contracts, progress, strict=False)
        followed = {contract: Progress.parse(text).followed for contract, text in known if text is not None}
        return RedisAnswers(followed, groups, dict(zip(places, replies, strict=True)))

    def _add(self, pipe: Any, asks: Sequence[Ask], groups: Mapping[str, Group]) -> list[tuple[str, str]]:
        """The commands for every (group, entity), each once; windows of one group asked twice get the wider range."""
        wanted: dict[tuple[str, str], range | int] = {}
        for ask in asks:
            if isinstance(ask, WindowAsk):
                chunks = chunks_of(ask)
                for key in ask.keys:
                    if key is not None:
                        before = wanted.get((ask.group, key), chunks)
                        assert isinstance(before, range)
                        wanted[ask.group, key] = range(min(before.start, chunks.start), max(before.stop, chunks.stop))
            else:
                wanted.update(((ask.group, key), ask.time_us) for key in ask.keys if key is not None)
        for (group, key), what in wanted.items():
            if isinstance(what, range):
                pipe.hmget(self._keys.tiles(groups[group].id, key), list(what))
            else:
                pipe.zrevrangebyscore(self._keys.rows(groups[group].id, key), what, "-inf", start=0, num=1)
        return list(wanted)

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose()
