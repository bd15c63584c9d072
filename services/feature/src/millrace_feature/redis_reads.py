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

from millrace_feature.redis_calls import unavailable
from millrace_feature.redis_layout import Group, Keys, Progress, unpack_row
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
    fields: Mapping[str, Sequence[str]]
    """Names of the fields asked for, by group of windows."""

    def windows(self, ask: WindowAsk) -> list[list[float]]:
        """Window features per key."""
        wanted = ask.reader.fields(ask.end_hop).names
        fetched = self.fields[ask.group]
        places = [place for place, key in enumerate(ask.keys) if key is not None]
        replies: list[Sequence[bytes | None]] = [self.found[ask.group, key] for key in ask.keys if key is not None]
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
        replies = [self.found[ask.group, key] if key is not None else () for key in ask.keys]
        return [unpack_row(reply[0]) if reply else None for reply in replies]


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
        places, fields = self._add(pipe, asks, groups)
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
        return RedisAnswers(followed, groups, dict(zip(places, replies, strict=True)), fields)

    def _add(
        self, pipe: Any, asks: Sequence[Ask], groups: Mapping[str, Group]
    ) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
        """The commands for every (group, entity), each once, with the fields all asks of the group together need."""
        fields: dict[str, dict[str, None]] = {}
        wanted: dict[tuple[str, str], int | None] = {}
        for ask in asks:
            if isinstance(ask, WindowAsk):
                fields.setdefault(ask.group, {}).update(dict.fromkeys(ask.reader.fields(ask.end_hop).names))
                wanted.update(((ask.group, key), None) for key in ask.keys if key is not None)
            else:
                wanted.update(((ask.group, key), ask.time_us) for key in ask.keys if key is not None)
        named = {group: list(names) for group, names in fields.items()}
        for (group, key), time_us in wanted.items():
            if time_us is None:
                pipe.hmget(self._keys.tiles(groups[group].id, key), named[group])
            else:
                pipe.zrevrangebyscore(self._keys.rows(groups[group].id, key), time_us, "-inf", start=0, num=1)
        return list(wanted), named

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose()
