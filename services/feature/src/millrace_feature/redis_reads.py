"""Online reads from Redis: everything a request needs in one pipelined round trip, then the arithmetic the embedded store does.

Each round trip also asks whether the groups are still the ones that were opened, so a Redis that lost its data, or a group that another
replica made anew, is noticed by the read itself and never answered as "no values". Only who asks about an instant before an entity's newest
row needs a second one, for the rows before it.
"""

import asyncio
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from millrace_kit.errors import UnavailableError
from redis.exceptions import RedisError

from millrace_feature.packed_rows import FloatRows, bound_of, unpack_row
from millrace_feature.redis_calls import unavailable
from millrace_feature.redis_layout import Group, Keys, Progress
from millrace_feature.store import Ask, Followed, LatestAsk, NewestRow, WindowAsk
from millrace_feature.tiles import Floats, Ints

_float_rows = functools.lru_cache(maxsize=1024)(FloatRows)


def rebuilding(group: str) -> UnavailableError:
    """Values of `group` are not there."""
    message = "the online store's values are being made anew; try again"
    return UnavailableError("ONLINE_STORE_REBUILDING", message, {"group": group})


@dataclass(frozen=True, slots=True)
class RedisAnswers:
    """`Answers` from what the store said."""

    followed: Mapping[str, Followed]
    tiles: Mapping[tuple[str, str], Sequence[bytes | None]]
    """Fields by (group, entity)."""
    fields: Mapping[str, Sequence[str]]
    """Names of the fields asked for, by group of windows."""
    rows: dict[int, list[bytes | None]]
    """Newest row per key, by the ask's identity."""

    def windows(self, ask: WindowAsk) -> list[list[float]]:
        """Window features per key."""
        wanted = ask.reader.fields(ask.end_hop).names
        fetched = self.fields[ask.group]
        places = [place for place, key in enumerate(ask.keys) if key is not None]
        replies: list[Sequence[bytes | None]] = [self.tiles[ask.group, key] for key in ask.keys if key is not None]
        if tuple(fetched) != wanted:  # another view of the same group asked for more
            at = {name: number for number, name in enumerate(fetched)}
            chosen = [at[name] for name in wanted]
            replies = [[reply[number] for number in chosen] for reply in replies]
        out: list[list[float]] = [ask.reader.missing] * len(ask.keys)
        for place, features in zip(places, ask.reader.read(replies, ask.end_hop), strict=True):
            out[place] = features
        return out

    def latest(self, ask: LatestAsk) -> list[NewestRow | None]:
        """Newest row per key."""
        return [None if packed is None else unpack_row(packed) for packed in self.rows[id(ask)]]

    def floats(self, ask: LatestAsk) -> tuple[Ints, Floats] | None:
        """Newest rows as arrays."""
        return _float_rows(ask.width).read(self.rows[id(ask)])


@dataclass(slots=True)
class _Request:
    """What one read asks of Redis, in the order of the commands."""

    tiles: list[tuple[str, str]] = field(default_factory=list)
    fields: dict[str, list[str]] = field(default_factory=dict)
    batches: list[tuple[Sequence[str | None], list[LatestAsk]]] = field(default_factory=list)
    """Keys, and the views that are asked for all of them."""


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
        request = self._add(pipe, asks, groups)
        try:
            async with asyncio.timeout(self._timeout_s):
                standing, progress, *replies = await pipe.execute()
                for name, entry in zip(names, standing, strict=False):
                    if entry is None or entry.partition(b" ")[0].decode() != groups[name].id:
                        raise rebuilding(name)
                rows = _rows(request, replies[len(request.tiles) :])
                await self._earlier(request, groups, rows)
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise unavailable(error) from error
        known = zip(contracts, progress, strict=False)
        followed = {contract: Progress.parse(text).followed for contract, text in known if text is not None}
        return RedisAnswers(followed, dict(zip(request.tiles, replies, strict=False)), request.fields, rows)

    def _add(self, pipe: Any, asks: Sequence[Ask], groups: Mapping[str, Group]) -> _Request:
        """The commands for every (group, entity) of windows, each once, with the fields all asks of the group together need; then those
        for every entity of newest rows, with all its views.
        """
        request = _Request()
        fields: dict[str, dict[str, None]] = {}
        places: dict[tuple[str, str], None] = {}
        for ask in asks:
            if isinstance(ask, WindowAsk):
                fields.setdefault(ask.group, {}).update(dict.fromkeys(ask.reader.fields(ask.end_hop).names))
                places.update(((ask.group, key), None) for key in ask.keys if key is not None)
            elif request.batches and request.batches[-1][0] is ask.keys:
                request.batches[-1][1].append(ask)
            else:
                request.batches.append((ask.keys, [ask]))
        request.tiles = list(places)
        request.fields = {group: list(names) for group, names in fields.items()}
        for group, key in request.tiles:
            pipe.hmget(self._keys.tiles(groups[group].id, key), request.fields[group])
        for keys, views in request.batches:
            named = [self._keys.newest(key) for key in keys if key is not None]
            pipe.hmget_each(named, [groups[ask.group].id for ask in views])
        return request

    async def _earlier(
        self, request: _Request, groups: Mapping[str, Group], rows: dict[int, list[bytes | None]]
    ) -> None:
        """Replace the rows that are later than their reads' instants by the newest ones before."""
        late: list[tuple[LatestAsk, int]] = []
        for _keys, views in request.batches:
            for ask in views:
                bound = bound_of(ask.time_us) if ask.time_us >= 0 else b""
                if max(filter(None, rows[id(ask)]), default=b"") >= bound:
                    late += [(ask, place) for place, row in enumerate(rows[id(ask)]) if row and row >= bound]
        if not late:
            return
        pipe = self._client.pipeline(transaction=False)
        for ask, place in late:
            key = ask.keys[place]
            assert key is not None
            name = self._keys.rows(groups[ask.group].id, key)
            pipe.zrevrangebyscore(name, ask.time_us, "-inf", start=0, num=1)
        for (ask, place), reply in zip(late, await pipe.execute(), strict=True):
            rows[id(ask)][place] = reply[0] if reply else None

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose()


def _rows(request: _Request, replies: Sequence[Sequence[bytes | None]]) -> dict[int, list[bytes | None]]:
    """Newest row per key, by the ask's identity."""
    out: dict[int, list[bytes | None]] = {}
    at = 0
    for keys, views in request.batches:
        count = sum(key is not None for key in keys) if None in keys else len(keys)
        part, at = replies[at : at + count], at + count
        for number, ask in enumerate(views):
            found = [reply[number] for reply in part]
            if count < len(keys):
                known = iter(found)
                found = [None if key is None else next(known) for key in keys]
            out[id(ask)] = found
    return out
